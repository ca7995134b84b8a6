"""What do pruning half of the channels and a student a tenth as large cost and bring; how large is the catalogue?

ResNet-50 and a 3-D U-Net, pruned by half and fine-tuned; a ResNet-50 teacher and its student: by `medray compress`,
its speed where it serves, and its paired differences on validation cases. Sizes: every catalogue default's weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks._bundles import trained
from benchmarks._studies import work_folder
from benchmarks.common import Figure, Result, Target, shared_data
from benchmarks.hippocampus import cases

LIMIT_MB = 100.0


def run(quick: bool) -> Result:
    """Figures: latency ratio and points lost of each step; megabytes of the largest default as it comes."""
    work = work_folder(quick)
    figures: dict[str, Figure] = {}
    notes: list[str] = []
    length = "train.epochs=1" if quick else "train.budget=120s"
    for name, (place, options) in _steps(work, quick).items():
        step = _step(work, name, place, options, length)
        if step.verdict is None:
            notes.append(f"{name}: {step.reason}")
            continue
        figures[f"{name}_latency_ratio"] = Figure(value=step.verdict.speedup)
        for metric, drop in step.verdict.drops.items():
            figures[f"{name}_drop_{metric}"] = Figure(value=drop.value, low=drop.low, high=drop.high)
        for what in ("macs", "parameters"):
            if f"{what}_after" in step.facts:
                share = step.facts[f"{what}_after"] / step.facts[f"{what}_before"]
                figures[f"{name}_{what}_share"] = Figure(value=share)
        notes.append(f"{name}: {step.sentence}")
    figures |= _sizes(notes, quick)
    return Result(figures=figures, targets={} if quick else _targets(figures), notes=notes)


def _steps(work: Path, quick: bool) -> dict[str, tuple[Path, dict[str, Any]]]:
    side, length = (32, {"epochs": 1}) if quick else (224, {"budget": 300.0})
    archive = str(shared_data() / "medmnist" / ("breastmnist.npz" if quick else "pneumoniamnist.npz"))
    flat = {
        "preprocess": {"size": [side, side]},
        "train": {**length, "batch_size": 8 if quick else 32},
        "model": {"name": "small_cnn", "feature_size": 48} if quick else {"name": "resnet50"},
    }
    classifier = trained(work, "compress-classifier", archive, flat)
    student = "small_cnn"
    found = {"prune_2d": (classifier, {"prune": 0.5}), "distill": (classifier, {"distill": student})}
    if not quick:
        table = cases(shared_data() / "msd_hippocampus", work)
        tree = {"model": {"name": "unet"}, "train": {**length}}
        found["prune_3d"] = (trained(work, "compress-hippocampus", str(table), tree), {"prune": 0.5})
    return found


def _step(work: Path, name: str, place: Path, options: dict[str, Any], length: str) -> Any:
    from medray.workflows.compress import CompressOptions, compress

    report = compress(
        place,
        CompressOptions(max_drop=1.0, **options),
        [length],
        out=work / "bundles" / f"compress-{name}-small",
    )
    return report.steps[0]


def _targets(figures: dict[str, Figure]) -> dict[str, Target]:
    targets = {}
    for name in ("prune_2d", "prune_3d"):
        metric = "dice" if name == "prune_3d" else "accuracy"
        if f"{name}_latency_ratio" in figures:
            targets[f"{name}_latency_ratio"] = Target(op=">=", value=2.0)
            targets[f"{name}_drop_{metric}"] = Target(op="<=", value=0.01)
    if "distill_drop_accuracy" in figures:
        targets["distill_drop_accuracy"] = Target(op="<=", value=0.01)
        targets["distill_parameters_share"] = Target(op="<=", value=0.1)
    targets["largest_default"] = Target(op="<=", value=LIMIT_MB)
    return targets


def _sizes(notes: list[str], quick: bool) -> dict[str, Figure]:
    """Of every catalogue entry as it comes (quick: of some): its weights in fp32."""
    from medray.models.catalogue import CATALOGUE, count_parameters

    chosen = list(CATALOGUE.items())[:: 8 if quick else 1]
    sizes = {name: 4e-6 * count_parameters(name, max(spec.ndims)) for name, spec in chosen}
    largest = max(sizes, key=sizes.__getitem__)
    over = sorted(name for name, size in sizes.items() if size > LIMIT_MB)
    notes.append(f"over {LIMIT_MB:g} MB in fp32: {', '.join(over) or 'none'}; the largest is {largest}.")
    notes.append("What each comes to once compressed was not measured.")
    return {
        "largest_default": Figure(value=sizes[largest], unit="MB"),
        "defaults_over_100_mb": Figure(value=float(len(over))),
    }
