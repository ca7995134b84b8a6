"""3-D segmentation, the main job: MSD hippocampus, 20 minutes on this machine, everything included.

Trial 0 alone (no search) gets the same 20 minutes beside it; where the study found no time for a search, it is that.
The 52 held-back volumes are measured once, by the champion that validation cases chose.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks._studies import QUICK, StudyRun, tune, work_folder, write_table
from benchmarks.common import Figure, Result, Target, shared_data

SECONDS = 1200.0


def cases(folder: Path, work: Path, *, limit: int | None = None) -> Path:
    """The given split as a table: 208 volumes to work with, 52 held back."""
    split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    held_back = next(value for key, value in split.items() if key != "train")
    rows = []
    for part, names in (("train", split["train"]), ("test", held_back)):
        for name in names[:limit]:
            image, mask = folder / "imagesTr" / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"
            rows.append({"image": str(image), "mask": str(mask), "patient": name, "split": part})
    return write_table(work / "hippocampus.csv", rows)


def study(work: Path, quick: bool, *, alone: bool = False) -> StudyRun:
    """The main job on it; ``alone`` gives trial 0 the whole budget, without a search."""
    table = cases(shared_data() / "msd_hippocampus", work, limit=10 if quick else None)
    words = [f"data={table}", f"study.budget={QUICK if quick else SECONDS}s"]
    if alone:
        return tune("seg3d.yaml", work, "hippocampus-default", [*words, "study.trials=1"])
    return tune("seg3d.yaml", work, "hippocampus", words)


def run(quick: bool) -> Result:
    """Figures: mean Dice on the test volumes, gain over trial 0, wall clock."""
    work, seconds = work_folder(quick), QUICK if quick else SECONDS
    ours = study(work, quick)
    figures = _figures(ours, seconds)
    peers = {}
    if ours.searched and not quick:
        peers = {"trial 0 alone, whole budget": _figures(study(work, quick, alone=True), seconds)}
    targets = (
        {}
        if quick
        else {"dice_mean_test": Target(op=">=", value=0.89), "wall_over_budget": Target(op="<=", value=1.05)}
    )
    notes = [
        "nnU-Net after GPU hours: 0.894 on the official test; a plain bf16 U-Net: 0.871 in 5 min, 0.887 in 10 and 17.",
        f"Champion: {ours.result['champion']}; {ours.result['cases']} test volumes; bootstrap over patients.",
    ]
    if not ours.searched:
        notes.append(
            "Too few trials that tell anything would have fitted here, so none was run: this is trial 0 alone."
        )
    return Result(
        figures=figures,
        targets=targets,
        peers=peers,
        notes=notes,
    )


def _figures(run: StudyRun, budget_seconds: float) -> dict[str, Figure]:
    hd95 = run.metric("hd95")
    return {
        "dice_mean_test": run.metric("dice"),
        "hd95_mean_test": Figure(value=hd95.value, low=hd95.low, high=hd95.high, unit="mm"),
        "gain_over_default": run.gain,
        "wall_over_budget": Figure(value=run.wall / budget_seconds),
    }
