"""Where a bundle looked, for images in files: ``medray explain``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medray.bundle.read import Bundle
from medray.data.manifest import Case
from medray.data.readers import read_case
from medray.data.writers import nifti, picture
from medray.errors import MedrayError
from medray.explain.cam import Explanation, Method, explain
from medray.workflows.inputs import expand


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What became of one input.

    Attributes:
        image: its reference(s).
        outputs: the files written.
        explanation: None where it failed.
        error: why; None where there is an explanation.
    """

    image: str
    outputs: tuple[Path, ...] = ()
    explanation: Explanation | None = None
    error: str | None = None


def explain_files(
    bundle_dir: Path | str,
    inputs: Sequence[str | Path],
    out_dir: Path,
    *,
    method: Method = "gradcam",
    target: str | None = None,
) -> tuple[Explained, ...]:
    """Explain every image; one that can't be read doesn't stop the rest.

    Writes ``NAME_METHOD.png``, the picture under its heat, or three slices of a volume; of a volume also
    ``NAME_METHOD.nii.gz``, on the voxel grid of the input.

    Args:
        bundle_dir: of the bundle.
        inputs: files, folders, globs, or references as readers take them.
        out_dir: is made; files of the same names are replaced.
        method: gradcam or gradcam++.
        target: a class by name or number; None for the answer itself.

    Raises:
        BundleError: the bundle can't be used.
        DataError: there is no image at all.
    """
    bundle = Bundle.open(bundle_dir)
    listed = expand([str(item) for item in inputs], ndim=bundle.spec.ndim, channels=bundle.spec.channels)
    model = bundle.model()
    out_dir.mkdir(parents=True, exist_ok=True)
    found = []
    for item in listed:
        shown = " + ".join(item.references)
        try:
            image, _, _ = read_case(Case(id=item.name, images=item.references), Path())
            result = explain(bundle, image, method=method, target=target, model=model)
            stem = out_dir / f"{item.name}_{method.replace('++', 'pp')}"
            note = f"{method} of {result.target_name}. {bundle.spec.intended_use}"
            files = [stem.with_name(stem.name + ".png")]
            files[0].parent.mkdir(parents=True, exist_ok=True)
            picture.write_heat(files[0], image, result.heat, note=note)
            if image.ndim == 3:
                files.append(stem.with_name(stem.name + ".nii.gz"))
                nifti.write_map(files[1], result.heat, image, note=note)
            found.append(Explained(image=shown, outputs=tuple(files), explanation=result))
        except MedrayError as error:
            found.append(Explained(image=shown, error=str(error)))
    return tuple(found)
