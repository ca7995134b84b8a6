"""2-D segmentation, the main job: DRIVE retinal vessels, official split, 20 minutes, field of view respected.

The second observer of the test images is a peer, not a target: nothing is trained or chosen on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks._studies import QUICK, StudyRun, tune, work_folder, write_table
from benchmarks.common import Figure, Result, Target, shared_data

SECONDS = 1200.0


def cases(folder: Path, work: Path) -> Path:
    """Both halves as a table; ``valid`` is the field of view."""
    rows = []
    for half, split in (("training", "train"), ("test", "test")):
        for image in sorted((folder / half / "images").iterdir()):
            number = image.stem.split("_")[0]
            mask = next((folder / half / "1st_manual").glob(f"{number}_*"))
            valid = next((folder / half / "mask").glob(f"{number}_*"))
            rows.append(
                {
                    "image": str(image),
                    "mask": str(mask),
                    "valid": str(valid),
                    "patient": f"{half}-{number}",
                    "split": split,
                }
            )
    return write_table(work / "drive.csv", rows)


def second_observer(folder: Path) -> Figure:
    """Dice of the second observer against the first, within the field of view."""
    from PIL import Image

    values = []
    for first in sorted((folder / "test" / "1st_manual").iterdir()):
        number = first.stem.split("_")[0]
        second = next((folder / "test" / "2nd_manual").glob(f"{number}_*"))
        valid = next((folder / "test" / "mask").glob(f"{number}_*"))
        one, two, inside = (np.asarray(Image.open(path).convert("L")) > 127 for path in (first, second, valid))
        one, two = one[inside], two[inside]
        values.append(2 * (one & two).sum() / (one.sum() + two.sum()))
    return Figure(value=float(np.mean(values)))


def study(work: Path, quick: bool) -> StudyRun:
    """The main job on it."""
    table = cases(shared_data() / "drive", work)
    return tune("seg.yaml", work, "drive", [f"data={table}", f"study.budget={QUICK if quick else SECONDS}s"])


def run(quick: bool) -> Result:
    """Figures: Dice on the 20 test images, gain over trial 0, wall clock."""
    ours, seconds = study(work_folder(quick), quick), QUICK if quick else SECONDS
    figures = {
        "dice_test": ours.metric("dice"),
        "gain_over_default": ours.gain,
        "wall_over_budget": Figure(value=ours.wall / seconds),
    }
    targets = (
        {} if quick else {"dice_test": Target(op=">=", value=0.81), "wall_over_budget": Target(op="<=", value=1.05)}
    )
    return Result(
        figures=figures,
        targets=targets,
        peers={"second observer": {"dice_test": second_observer(shared_data() / "drive")}},
        notes=["U-Net in the literature: .825.", f"Champion: {ours.result['champion']}."],
    )
