"""Classification, the main job: PneumoniaMNIST and BreastMNIST, official splits, 15 minutes a set, five seeds.

The 15 minutes are those of all five seeds together, three for a study: less than a user with 15 for one would give, and
a benchmark that ends in half an hour. Everything is chosen on the validation half; the test half is measured once a
seed.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks._studies import QUICK, StudyRun, tune, work_folder
from benchmarks.common import Figure, Result, Target, over_seeds, shared_data

SEEDS = 5
SECONDS = 900.0 / SEEDS
"""Budget of one study."""

SETS = {"pneumoniamnist": (0.980, 0.92), "breastmnist": (0.91, 0.88)}


def study(work: Path, quick: bool, name: str, seed: int) -> StudyRun:
    """The main job on one set, with one seed."""
    archive = shared_data() / "medmnist" / f"{name}.npz"
    budget = f"study.budget={QUICK if quick else SECONDS}s"
    return tune("cls.yaml", work, f"{name}-{seed}", [f"data={archive}", budget, f"study.seed={seed}", f"seed={seed}"])


def run(quick: bool) -> Result:
    """Figures: AUC and accuracy, mean of the seeds with the interval of that mean; gain over trial 0."""
    work, seconds, seeds = work_folder(quick), QUICK if quick else SECONDS, 1 if quick else SEEDS
    figures: dict[str, Figure] = {}
    targets: dict[str, Target] = {}
    for name, (auc, accuracy) in SETS.items():
        if quick and name != "breastmnist":
            continue
        runs = [study(work, quick, name, seed) for seed in range(seeds)]
        for metric, target in (("auc", auc), ("accuracy", accuracy)):
            figures[f"{name}_{metric}"] = over_seeds([run.metric(metric).value for run in runs])
            if not quick:
                targets[f"{name}_{metric}"] = Target(op=">=", value=target)
        figures[f"{name}_gain_over_default"] = over_seeds([run.gain.value for run in runs])
        figures[f"{name}_wall_over_budget"] = Figure(value=max(run.wall for run in runs) / seconds)
    return Result(
        figures=figures,
        targets=targets,
        notes=[
            f"{seeds} seed(s) of {seconds:.0f} s each; intervals are those of the mean over seeds (Student's t).",
            "Published at 28 px (AUC/ACC): Pneumonia ResNet-18 .944/.854, Google AutoML .991/.946; "
            "Breast .901/.863, Google AutoML .919/.861. Breast's test set has 156 images: ±.05.",
        ],
    )
