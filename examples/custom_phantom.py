"""A phantom of your own: images whose truth is known, to try a pipeline before real data are there.

    python examples/custom_phantom.py [FOLDER]

A phantom is a function from random generators to pixels and a mask, and a description. Registered under a name, it can
be written as files, which any command takes as `data=`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from medray.data.phantoms import PHANTOMS, PhantomSpec, Scanner, write_phantom
from medray.data.phantoms.base import Rendered, axes, ball, blend, smooth_field
from medray.workflows.check import check_data


def render_cyst(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    _flags: tuple[int, ...],
) -> Rendered:
    """A dark cyst in speckled tissue, as ultrasound shows it.

    What belongs to the person comes from ``patient`` (alike in both of their images), what belongs to the moment from
    ``image``, what belongs to the machine from ``scanner``. ``_flags`` would name the classes to show, in
    classification.
    """
    grids = axes(shape, (2.0, 2.0))  # pixel centres, -1 to 1, at any matrix size
    centre, semi = patient.uniform(-0.4, 0.4, 2), patient.uniform(0.2, 0.4, 2)
    cyst = ball(grids, centre, semi, width=scanner.blur * 2.0 / shape[0])  # edges as wide as the point spread
    tissue = 110.0 + 8.0 * smooth_field(patient, shape, 4.0)
    clean = blend(tissue, cyst, 25.0)
    speckle = image.rayleigh(scale=1.0, size=shape) / np.sqrt(np.pi / 2)  # multiplicative, of mean 1
    array = clean * (1.0 + scanner.noise * (speckle - 1.0))
    return Rendered(array=array[None].clip(0, 255).astype(np.float32), mask=(cyst > 0.5).astype(np.uint8))


PHANTOMS["us-cysts"] = PhantomSpec(
    name="us-cysts",
    description="ultrasound with one cyst",
    task="segmentation",
    modality="US",
    channels=1,
    classes=("background", "cyst"),
    size=(48, 48),
    cases=12,
    scanners=(Scanner(site="north", noise=0.3), Scanner(site="south", noise=0.5, blur=2.0)),
    render=render_cyst,
)


def main(folder: Path) -> None:
    table = write_phantom("us-cysts", folder, seed=0)
    manifest = check_data(str(table))
    print(f"{len(manifest.cases)} cases of {len({case.group for case in manifest.cases})} patients, {manifest.classes}")
    print(f"findings: {[finding.message for finding in manifest.findings]}")
    print(f"now: medray tune search_spaces/seg.yaml data={table}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
