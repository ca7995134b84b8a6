"""Check a data set and read what was found.

    python examples/check_data.py [DATA]

On the command line the same is `medray check DATA`. Without DATA, a small set is written to a temporary folder and
spoiled in three ways that are common in practice.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from medray.data.checks import require_sound
from medray.data.phantoms import write_phantom
from medray.errors import DataError
from medray.workflows.check import check_data


def spoiled(folder: Path) -> str:
    """A phantom as files, with one image truncated, one overwritten by another, one empty."""
    table = write_phantom("fundus-lesions", folder, cases=8, size=32)
    images = sorted((folder / "images").glob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:200])  # the copy was interrupted
    shutil.copy(images[2], images[4])  # the same picture under two names
    images[6].write_bytes(b"")  # a full disk
    return str(table)


def main(source: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A source is a folder, a table, a dataset.json, an .npz, a DICOM tree, or phantom://NAME.
        manifest = check_data(source or spoiled(Path(folder)))
        print(f"{len(manifest.cases)} cases; {manifest.task}, {manifest.ndim}-D, {manifest.modality}")

        # Each finding names the case, what is wrong with it, and what to do. `rule` is stable: programs may rely on it.
        for finding in manifest.findings:
            print(f"{finding.severity:7} {finding.rule:12} {finding.case}: {finding.message}. Fix: {finding.fix}")

        # What trains calls this first: errors among the findings end it; with strict=True warnings do, too.
        try:
            require_sound(manifest, strict=False)
        except DataError as error:
            print(f"\nnot fit for training:\n{error}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
