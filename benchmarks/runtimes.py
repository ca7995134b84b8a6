"""How much faster than torch eager is the engine that `runtime: auto` takes, on three classifiers and two segmenters?

Each bundle's engines take turns on its golden inputs, one input at a time, with the same threads. ONNX Runtime fp32 is
the engine that auto must never be slower than. For the default 3-D network the voxels a second are given for windows
alone, and for a whole volume with what their overlap costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._bundles import trained
from benchmarks._studies import work_folder
from benchmarks.common import Figure, Result, Target

VOLUME = (512, 512, 200)
"""Voxels of the volume whose time is reported."""

SEGMENT = {"inference": {"overlap": 0.5}}


def bundles(work: Path, quick: bool) -> dict[str, Path]:
    """Trained for a minute each on phantoms (quick: a few steps of small networks)."""
    side, seconds = (32, 3.0) if quick else (224, 60.0)
    films = f"phantom://xray-nodules?cases={24 if quick else 200}"
    train = {"budget": seconds, "batch_size": 8}
    flat = {"preprocess": {"size": [side, side]}, "train": train, "split": {"test": 0.0}}
    names = ["small_cnn"] if quick else ["resnet18", "resnet50", "densenet121"]
    found = {name: trained(work, f"runtimes-{name}", films, {**flat, "model": {"name": name}}) for name in names}
    width = {"feature_size": 8, "depth": 3} if quick else {}
    lesions = (
        {"mr-lesions": (24, 32, 24), "fundus-vessels": (32, 32)}
        if quick
        else {"mr-lesions": None, "fundus-vessels": None}
    )
    for source, patch in lesions.items():
        tree: dict[str, Any] = {
            "model": {"name": "unet", **width},
            "train": {
                "budget": seconds,
                **({"batch_size": 2} if quick else {}),
                **({"patch_size": list(patch)} if patch else {}),
            },
            "split": {"test": 0.0},
            **SEGMENT,
        }
        found[f"unet-{source}"] = trained(
            work, f"runtimes-{source}", f"phantom://{source}?cases={8 if quick else 40}", tree
        )
    return found


def run(quick: bool) -> Result:
    """Figures: auto against torch eager fp32 and against ONNX Runtime fp32, by bundle; voxels a second in 3-D."""
    from medray.bundle.engines import candidates, race
    from medray.bundle.read import Bundle

    work = work_folder(quick)
    figures: dict[str, Figure] = {}
    peers: dict[str, dict[str, Figure]] = {"torch eager fp32": {}, "ONNX Runtime fp32": {}}
    notes, least, against = [], [], []
    for name, place in bundles(work, quick).items():
        bundle = Bundle.open(place)
        found = bundle.select()
        keys: dict[Any, Any] = {
            (engine, precision): bundle.predictor(engine, precision=precision)  # type: ignore[arg-type]
            for engine, precision in candidates(bundle, "cpu", None)
            if (engine, precision) in {("torch", "fp32"), ("onnx", "fp32"), (found.engine, found.precision)}
        }
        times = race(keys, bundle.golden()[0], rounds=5 if quick else 40, seconds=0.5 if quick else 10.0)
        median = {key: float(np.median(values)) for key, values in times.items()}
        auto = median[found.engine, found.precision]
        figures[f"{name}_per_second"] = Figure(value=1 / auto, unit="1/s")
        figures[f"{name}_over_torch"] = Figure(value=median["torch", "fp32"] / auto)
        figures[f"{name}_over_onnx"] = Figure(value=median["onnx", "fp32"] / auto)
        peers["torch eager fp32"][f"{name}_per_second"] = Figure(value=1 / median["torch", "fp32"], unit="1/s")
        peers["ONNX Runtime fp32"][f"{name}_per_second"] = Figure(value=1 / median["onnx", "fp32"], unit="1/s")
        least.append(figures[f"{name}_over_torch"].value)
        against.append(figures[f"{name}_over_onnx"].value)
        notes.append(f"{name}: auto takes {found.shown}")
        if bundle.spec.ndim == 3:
            figures |= _voxels(bundle, auto)
    figures["least_over_torch"] = Figure(value=min(least))
    figures["least_over_onnx"] = Figure(value=min(against))
    targets = {} if quick else {"least_over_onnx": Target(op=">=", value=1.0)}
    if not quick and _has_bf16():
        targets["least_over_torch"] = Target(op=">=", value=2.5)
    elif not _has_bf16():
        notes.append("This CPU multiplies no bfloat16 in hardware, so the target over torch does not apply.")
    notes.append("least_over_onnx scatters about 1 by some percents where auto is ONNX Runtime itself.")
    return Result(figures=figures, targets=targets, peers=peers, notes=notes)


def _voxels(bundle: Any, seconds: float) -> dict[str, Figure]:
    """Of the windows alone, and of a large volume, each of whose voxels several windows see."""
    patch, overlap = bundle.spec.inference.patch_size, bundle.spec.inference.overlap
    windows = 1
    for n, size in zip(VOLUME, patch, strict=True):
        step = max(1, int(size * (1 - overlap)))
        windows *= 1 + max(0, -(-(n - size) // step))
    voxels = float(np.prod(patch))
    return {
        "voxels_of_windows": Figure(value=voxels / seconds / 1e6, unit="Mvoxel/s"),
        "voxels_of_volume": Figure(value=float(np.prod(VOLUME)) / (windows * seconds) / 1e6, unit="Mvoxel/s"),
        "volume_512x512x200": Figure(value=windows * seconds, unit="s"),
    }


def _has_bf16() -> bool:
    from medray.train.precision import cpu_has_bf16

    return cpu_has_bf16()
