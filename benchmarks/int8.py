"""What does int8 bring, and what does it cost, on PneumoniaMNIST at 224 px and on hippocampus?

Each bundle is quantised by `medray compress --quantize int8` with its own training cases. Speed: each runtime's int8
against its own fp32 and bf16 and against ONNX Runtime fp32, all taking turns. Cost: paired difference on validation
cases, which the gate judges. A network that quantises badly shows that the gate refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._bundles import trained
from benchmarks._studies import work_folder
from benchmarks.common import Figure, Result, Target, shared_data
from benchmarks.hippocampus import cases

BAD = "timm:mobilenetv3_small_100"
"""Squeeze-and-excitation and hard-swish on thin channels: known to lose by plain post-training quantisation."""


def bundles(work: Path, quick: bool) -> dict[str, Path]:
    """The two of the question; each trained for two minutes (quick: seconds, small)."""
    # Epochs at the quick size: seconds on a busy machine may be no step at all.
    side, length = (32, {"epochs": 1}) if quick else (224, {"budget": 120.0})
    archive = str(shared_data() / "medmnist" / ("breastmnist.npz" if quick else "pneumoniamnist.npz"))
    flat = {
        "preprocess": {"size": [side, side]},
        "train": {**length, "batch_size": 8 if quick else 32},
        "model": {"name": "small_cnn" if quick else "resnet18"},
    }
    table = cases(shared_data() / "msd_hippocampus", work, limit=8 if quick else None)
    model = {"name": "unet", **({"feature_size": 8, "depth": 3} if quick else {})}
    train = {**length, **({"batch_size": 2, "patch_size": [24, 32, 24]} if quick else {})}
    return {
        "pneumonia": trained(work, "int8-pneumonia", archive, flat),
        "hippocampus": trained(work, "int8-hippocampus", str(table), {"model": model, "train": train}),
    }


def run(quick: bool) -> Result:
    """Figures by bundle: best int8 over ONNX Runtime fp32, over its own bf16, size, points lost."""
    work = work_folder(quick)
    figures: dict[str, Figure] = {}
    targets: dict[str, Target] = {}
    notes: list[str] = []
    for name, place in bundles(work, quick).items():
        found, step = _quantised(work, name, place, max_drop=1.0)
        for metric, drop in step.verdict.drops.items():
            figures[f"{name}_drop_{metric}"] = Figure(value=drop.value, low=drop.low, high=drop.high)
        before, after = step.verdict.onnx_mb
        figures[f"{name}_size_share"] = Figure(value=after / before)
        if found is None:
            notes.append(f"{name}: {step.reason}")
            continue
        figures |= _speed(name, place, found, quick)
        if not quick:
            metric = "accuracy" if name == "pneumonia" else "dice"
            targets |= {
                f"{name}_int8_over_onnx_fp32": Target(op=">=", value=3.5),
                f"{name}_drop_{metric}": Target(op="<=", value=0.005),
                f"{name}_size_share": Target(op="<=", value=0.25),
            }
            if name == "pneumonia" and "pneumonia_int8_over_own_bf16" in figures:
                targets["pneumonia_int8_over_own_bf16"] = Target(op=">=", value=1.5)
    if not quick:
        figures["refused_where_bad"], note = _refused(work)
        targets["refused_where_bad"] = Target(op="==", value=1)
        notes.append(note)
    if not any("bf16" in key for key in figures):
        notes.append("This CPU multiplies no bfloat16 in hardware: there is no bf16 to stand beside.")
    return Result(figures=figures, targets=targets, notes=notes)


def _quantised(work: Path, name: str, place: Path, *, max_drop: float) -> tuple[Path | None, Any]:
    from medray.workflows.compress import CompressOptions, compress

    out = work / "bundles" / f"int8-{name}-small"
    options = CompressOptions(quantize="int8", max_drop=max_drop)
    report = compress(place, options, out=out)
    (step,) = report.steps
    if step.verdict is None:
        raise RuntimeError(f"{name}: {step.reason}")
    return report.bundle, step


def _speed(name: str, fp32: Path, int8: Path, quick: bool) -> dict[str, Figure]:
    from medray.bundle.engines import candidates, race
    from medray.bundle.read import Bundle

    engines: dict[Any, Any] = {}
    inputs = Bundle.open(fp32).golden()[0]
    for place in (fp32, int8):
        bundle = Bundle.open(place)
        for engine, precision in candidates(bundle, "cpu", None):
            engines[engine, precision] = bundle.predictor(engine, precision=precision)  # type: ignore[arg-type]
    times = race(engines, inputs, rounds=5 if quick else 40, seconds=0.5 if quick else 10.0)
    median = {key: float(np.median(values)) for key, values in times.items()}
    figures = {
        f"{name}_{engine}_{precision}": Figure(value=1 / seconds, unit="1/s")
        for (engine, precision), seconds in median.items()
    }
    best = min((key for key in median if key[1] == "int8"), key=median.__getitem__)
    figures[f"{name}_int8_over_onnx_fp32"] = Figure(value=median["onnx", "fp32"] / median[best])
    for precision in ("fp32", "bf16"):
        if (best[0], precision) in median:
            figures[f"{name}_int8_over_own_{precision}"] = Figure(value=median[best[0], precision] / median[best])
    return figures


def _refused(work: Path) -> tuple[Figure, str]:
    archive = str(shared_data() / "medmnist" / "pneumoniamnist.npz")
    tree = {
        "preprocess": {"size": [64, 64]},
        "train": {"budget": 90.0, "batch_size": 32},
        "model": {"name": BAD},
    }
    place = trained(work, "int8-bad", archive, tree)
    from medray.workflows.compress import CompressOptions, compress

    report = compress(place, CompressOptions(quantize="int8"), out=work / "bundles" / "int8-bad-small")
    (step,) = report.steps
    return Figure(value=float(not step.kept)), f"{BAD}: {step.sentence}"
