"""What does medray gain over a plain baseline: a fixed recipe, no search, the same seconds?

Hippocampus, DRIVE and MedMNIST (Pneumonia and Breast). The baseline of each is a published-style recipe in plain
PyTorch and MONAI, see ``_plain.py``. medray's side is read from the studies of the benchmarks of those names where they
have been run, and run like them where not. The gain is the relative error reduction, 1 - (1 - medray) / (1 - plain), of
the metric that the study optimised, averaged over the three data sets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks import drive as drive_benchmark
from benchmarks import hippocampus as hippocampus_benchmark
from benchmarks import medmnist as medmnist_benchmark
from benchmarks._studies import work_folder
from benchmarks.common import Figure, Result, Target, shared_data
from benchmarks.medmnist import SETS

SEEDS = 3
"""Of the MedMNIST studies: the first so many of that benchmark's five, on both sides."""


def run(quick: bool) -> Result:
    """Figures: medray's test metric, the baseline's beside it, and the relative error reduction."""
    work = work_folder(quick)
    ours: dict[str, Figure] = {}
    plain: dict[str, Figure] = {}
    gains: dict[str, float] = {}
    for name, side in (("hippocampus", _hippocampus), ("drive", _drive), ("medmnist", _medmnist)):
        for figure, (our, their) in side(work, quick).items():
            ours[figure], plain[figure] = Figure(value=our), Figure(value=their)
        judged = [key for key in ours if key.startswith(name) and not key.endswith("accuracy")]
        gains[name] = mean(1.0 - (1.0 - ours[key].value) / (1.0 - plain[key].value) for key in judged)
    figures = {
        **ours,
        **{f"error_reduction_{name}": Figure(value=value) for name, value in gains.items()},
        "error_reduction": Figure(value=mean(gains.values())),
    }
    seeds = 1 if quick else SEEDS
    return Result(
        figures=figures,
        targets={} if quick else {"error_reduction": Target(op=">=", value=0.05)},
        peers={"plain baseline": plain},
        notes=[
            "Plain: MONAI UNet (16, 32, 64, 128, 256), Adam 1e-3, Dice + cross-entropy, fp32, no augmentation "
            "(DRIVE: random flips); MedMNIST: ResNet-18 by MedMNIST v2's recipe, its 100 epochs and their steps "
            "pressed into the budget where they would outlast it. Best epoch by validation, test measured once.",
            f"MedMNIST: mean of {seeds} seed(s) on both sides; the gain is that of the AUC.",
        ],
    )


Pairs = dict[str, tuple[float, float]]
"""Of each figure: medray's value, the baseline's."""


def _hippocampus(work: Path, quick: bool) -> Pairs:
    from benchmarks import _plain

    folder, seconds = shared_data() / "msd_hippocampus", hippocampus_benchmark.SECONDS
    limit = 10 if quick else None
    ours = hippocampus_benchmark.study(work, quick)

    def plain(started: float) -> dict[str, float]:
        recipe = _plain.segmentation(3, 1, 3, batch=4)
        return _plain.train(
            recipe, _plain.hippocampus(folder, limit=limit), seconds=_time(seconds, quick), started=started
        )

    return {"hippocampus_dice": (ours.metric("dice").value, _once(work, "hippocampus", plain)["dice"])}


def _drive(work: Path, quick: bool) -> Pairs:
    from benchmarks import _plain

    folder, seconds = shared_data() / "drive", drive_benchmark.SECONDS
    ours = drive_benchmark.study(work, quick)

    def plain(started: float) -> dict[str, float]:
        recipe = _plain.segmentation(2, 3, 2, batch=2, flips=(0, 1))
        return _plain.train(recipe, _plain.drive(folder), seconds=_time(seconds, quick), started=started)

    return {"drive_dice": (ours.metric("dice").value, _once(work, "drive", plain)["dice"])}


def _medmnist(work: Path, quick: bool) -> Pairs:
    from benchmarks import _plain

    folder, seconds, seeds = shared_data() / "medmnist", medmnist_benchmark.SECONDS, 1 if quick else SEEDS
    pairs: Pairs = {}
    for name in ["breastmnist"] if quick else SETS:
        archive = folder / f"{name}.npz"
        our: dict[str, list[float]] = {"auc": [], "accuracy": []}
        their: dict[str, list[float]] = {"auc": [], "accuracy": []}
        for seed in range(seeds):
            study = medmnist_benchmark.study(work, quick, name, seed)

            def plain(started: float, archive: Path = archive, seed: int = seed) -> dict[str, float]:
                parts = _plain.medmnist(archive)
                recipe = _plain.classification(parts["train"].images.shape[1], 2)
                return _plain.train(recipe, parts, seconds=_time(seconds, quick), started=started, seed=seed)

            found = _once(work, f"{name}-{seed}", plain)
            for metric in our:
                our[metric].append(study.metric(metric).value)
                their[metric].append(found[metric])
        for metric in our:
            pairs[f"medmnist_{name}_{metric}"] = (mean(our[metric]), mean(their[metric]))
    return pairs


def _time(seconds: float, quick: bool) -> float:
    return 3.0 if quick else seconds


def _once(work: Path, name: str, train: Callable[[float], dict[str, float]]) -> dict[str, float]:
    """The baseline's test metrics; like a finished study, one that has been trained is read, not trained again."""
    path = work / "plain" / f"{name}.json"
    if not path.is_file():
        found = train(time.monotonic())
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
        partial.replace(path)
    stored: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return stored
