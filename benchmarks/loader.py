"""What do reading and augmenting cost a training step?

The same optimiser steps of the planned default, once on batches from the loader (mapped file, default augmentation) and
once on such batches kept in memory. Both take turns in one process, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Figure, Result, Target
from medray.config.compose import build_experiment
from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.fingerprint import measure
from medray.data.layouts import build_manifest
from medray.data.loader import Batch, TrainLoader, train_loader
from medray.data.manifest import Manifest
from medray.data.splits import make_splits
from medray.learn.intervals import bootstrap
from medray.learn.losses import build_loss
from medray.learn.optimizers import build_optimizer
from medray.models.catalogue import build_model
from medray.plan.machine import Machine
from medray.plan.plan import plan
from medray.train.precision import lay_out, resolve_precision
from medray.train.runtime import LocalRuntime
from medray.train.step import Stepper

LIMIT = 1.10


def run(quick: bool) -> Result:
    """Steps at 28 px (batches of 128) and on 3-D patches, loaded against preloaded."""
    rounds, steps = (2, 2) if quick else (30, 8)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        scenes = {
            "2d_28px": thumbnails(Path(folder), 512 if quick else 2048),
            "3d": "phantom://mr-lesions?cases=16&size=56",
        }
        for name, source in scenes.items():
            manifest = build_manifest(source)
            overrides = {"device": "cpu", "train": {"batch_size": 128}} if name == "2d_28px" else {"device": "cpu"}
            layer = plan(measure(manifest), Machine.here(), budget=None)
            experiment = build_experiment(layer, overrides)
            loader, stepper = prepare(manifest, experiment, Path(folder) / "cache")
            loaded, preloaded = compare(loader, stepper, rounds, steps)
            ratios = np.array(loaded) / np.array(preloaded)
            value, low, high = bootstrap(ratios, lambda sample: float(np.median(sample)), seed=0)
            figures[f"ratio_{name}"] = Figure(value=value, low=low, high=high)
            figures[f"step_{name}"] = Figure(value=1e3 * statistics.median(preloaded) / steps, unit="ms")
    return Result(
        figures=figures,
        targets={name: Target(op="<=", value=LIMIT) for name in figures if name.startswith("ratio")},
        notes=[f"{torch.get_num_threads()} threads; {rounds} turns of {steps} steps a side"],
    )


def thumbnails(folder: Path, cases: int) -> str:
    """An archive in MedMNIST's layout: reading and augmenting cost the same whatever the pixels show."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in {"train": cases, "val": 32, "test": 32}.items():
        arrays[f"{split}_images"] = rng.integers(0, 255, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (n, 1), dtype=np.uint8)
    np.savez(folder / "thumbnails.npz", **arrays)
    return str(folder / "thumbnails.npz")


def prepare(manifest: Manifest, experiment: Experiment, cache: Path) -> tuple[TrainLoader, Stepper]:
    """The loader and one optimiser step, as fit() would have them."""
    store = PreparedStore.open_or_build(manifest, experiment.preprocess, cache)
    kind, classes = manifest.task, len(manifest.classes)
    train = make_splits(manifest, experiment.split, experiment.seed).train
    loader = train_loader(store, train, experiment, kind=kind, num_classes=classes)
    model = build_model(
        experiment.model,
        kind=kind,
        ndim=manifest.ndim,
        in_channels=manifest.channels,
        num_outputs=classes,
        patch_size=experiment.train.patch_size or experiment.preprocess.size,
    )
    runtime = LocalRuntime("cpu")
    precision = resolve_precision(experiment.train.precision, runtime.device)
    stepper = Stepper(
        model.train(),
        build_optimizer(model, experiment.optim),
        build_loss(experiment.loss, kind=kind, num_classes=classes),
        runtime=runtime,
        precision=precision,
        micro_batch=experiment.train.micro_batch,
        clip_norm=experiment.optim.clip_norm,
        channels_last=lay_out(model, runtime.device, precision),
    )
    return loader, stepper


def compare(loader: TrainLoader, stepper: Stepper, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of ``steps`` steps, ``rounds`` times each: with the loader, and on batches that it made before."""
    endless = (batch for _ in iter(int, 1) for batch in loader)
    ready = [next(endless) for _ in range(steps)]
    timed(stepper, ready)  # warm-up: kernels are chosen, pages are mapped
    loaded, preloaded = [], []
    for number in range(rounds):
        for side in ((loaded, preloaded), (preloaded, loaded))[number % 2]:
            fresh = (next(endless) for _ in range(steps))
            side.append(timed(stepper, ready if side is preloaded else fresh))
    return loaded, preloaded


def timed(stepper: Stepper, batches: Iterable[Batch]) -> float:
    """Seconds that the steps take, their loading included."""
    started = time.perf_counter()
    for batch in batches:
        stepper(batch, place=lambda: "benchmark")
    return time.perf_counter() - started
