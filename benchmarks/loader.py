"""How fast are batches made beside MONAI's datasets, and what do reading and augmenting cost a training step?

Two questions, each in 2-D and 3-D:

- an epoch of batches alone, by our loader and by MONAI's CacheDataset and PersistentDataset with the same preprocessing
  and the same random transforms: the first epoch, those after it, and memory, with 1, 2 and 4 loader workers;
- the same optimiser steps of the planned default, once on batches from the loader (mapped file, default augmentation)
  and once on such batches kept in memory. Both take turns in one process, so that a busy machine slows both.

Real data where they are there, else phantoms.

    python -m benchmarks loader
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._loader_race import CONTENDERS, OURS, PERSISTENT, PROCESSES, Passes, race
from benchmarks._studies import write_table
from benchmarks.common import Figure, Figures, Result, Target, shared_data
from benchmarks.hippocampus import cases as hippocampus_cases
from medray.config.compose import build_experiment
from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.fingerprint import measure
from medray.data.layouts import build_manifest
from medray.data.loader import Batch, TrainLoader, train_loader
from medray.data.manifest import Manifest
from medray.data.phantoms.files import write_phantom
from medray.data.splits import make_splits
from medray.learn.intervals import bootstrap
from medray.learn.optimizers import build_optimizer
from medray.models.catalogue import build_model
from medray.plan.machine import Machine
from medray.plan.plan import plan
from medray.tasks.catalogue import build_loss
from medray.train.precision import lay_out, resolve_precision
from medray.train.runtime import LocalRuntime
from medray.train.step import Stepper

STEPS, FASTER, GROWTH = 1.05, 1.5, 1.1
"""Targets: an epoch over the same steps on batches in memory; our rate over PersistentDataset's; our memory with most
workers over that with one."""
SIDE = 128
"""Pixels along an axis of the pictures, as they lie in fed_isic_ham."""


def run(quick: bool) -> Result:
    """Race the loaders, then steps with the loader against steps without."""
    figures: dict[str, Figure] = {}
    contenders = [name for name in CONTENDERS if not (quick and name == PROCESSES)]
    peers: dict[str, dict[str, Figure]] = {name: {} for name in contenders if name != OURS}
    targets: dict[str, Target] = {}
    with tempfile.TemporaryDirectory() as folder:
        tables, source = tables_in(Path(folder), quick)
        for scene, table in tables.items():
            if quick and scene != "3d":
                continue
            race_in(scene, table, figures, targets, peers, workers=(1, 2) if quick else (1, 2, 4), quick=quick)
        tables["2d_28px"] = thumbnails(Path(folder), 512 if quick else 2048)
        rounds, steps = (2, 2) if quick else (30, 8)
        for scene, table in tables.items():
            if quick and scene == "2d":
                continue
            manifest = build_manifest(table)
            overrides = {"device": "cpu", "train": {"batch_size": 128}} if scene == "2d_28px" else {"device": "cpu"}
            experiment = build_experiment(plan(measure(manifest), Machine.here(), budget=None), overrides)
            loader, stepper = prepare(manifest, experiment, Path(folder) / "cache")
            loaded, preloaded = compare(loader, stepper, rounds, steps)
            ratios = np.array(loaded) / np.array(preloaded)
            value, low, high = bootstrap(ratios, lambda sample: float(np.median(sample)), seed=0)
            figures[f"epoch over preloaded, {scene}"] = Figure(value=value, low=low, high=high)
            targets[f"epoch over preloaded, {scene}"] = Target(op="<=", value=STEPS)
            figures[f"step, {scene}"] = Figure(value=1e3 * statistics.median(preloaded) / steps, unit="ms")
    notes = [
        f"{source}; batches and patches as the plan has them. A first epoch has all that is prepared before it.",
        "Memory: all processes of a loader, pages that several of them have counted once (PSS), imports included.",
        "medray's helpers are threads, as they are where a CPU trains"
        + ("." if quick else "; 'medray, processes' is what feeds a GPU."),
        f"Steps: {torch.get_num_threads()} threads; {rounds} turns of {steps} steps a side, loader workers as chosen.",
    ]
    return Result(figures=figures, targets=targets, peers=peers, notes=notes)


def race_in(
    scene: str,
    table: str,
    figures: dict[str, Figure],
    targets: dict[str, Target],
    peers: Mapping[str, dict[str, Figure]],
    *,
    workers: Iterable[int],
    quick: bool,
) -> None:
    """Add the figures of one data set's race, for each number of workers."""
    explicit = settings(build_manifest(table))
    contenders = [OURS, *peers]
    found = {number: race(contenders, table, explicit, number, rounds=2 if quick else 8) for number in workers}
    for number, passes in found.items():
        figures.update(race_figures(passes[OURS], f"{scene}, {number} workers"))
        for name in peers:
            peers[name].update(race_figures(passes[name], f"{scene}, {number} workers"))
    ratios = [np.array(passes[OURS].rates) / np.array(passes[PERSISTENT].rates) for passes in found.values()]
    value, low, high = bootstrap(np.concatenate(ratios), lambda sample: float(np.median(sample)), seed=0)
    figures[f"over PersistentDataset, {scene}"] = Figure(value=value, low=low, high=high)
    targets[f"over PersistentDataset, {scene}"] = Target(op=">=", value=FASTER)
    memory = [passes[OURS].memory for passes in found.values()]
    figures[f"memory with most workers over one, {scene}"] = Figure(value=memory[-1] / memory[0])
    targets[f"memory with most workers over one, {scene}"] = Target(op="<=", value=GROWTH)


def race_figures(passes: Passes, where: str) -> Figures:
    """One contender's, by name."""
    return {
        f"first epoch, {where}": Figure(value=passes.first, unit="s"),
        f"later epochs, {where}": Figure(value=statistics.median(passes.rates), unit="samples/s"),
        f"memory, {where}": Figure(value=passes.memory, unit="MiB"),
    }


def settings(manifest: Manifest) -> dict[str, Any]:
    """The plan's experiment, explicit; MONAI needs to be told a patch where we take the whole picture."""
    layer = plan(measure(manifest), Machine.here(), budget=None)
    overrides: dict[str, Any] = {"device": "cpu"}
    if manifest.ndim == 2:
        overrides |= {"train": {"batch_size": 32}, "preprocess": {"size": [SIDE, SIDE]}}
    explicit: dict[str, Any] = build_experiment(layer, overrides).model_dump(mode="json")
    return explicit


def tables_in(folder: Path, quick: bool) -> tuple[dict[str, str], str]:
    """The data sets as tables, and what they are."""
    try:
        shared = shared_data()
    except SystemExit:
        size = 24 if quick else 128
        return {
            "3d": str(write_phantom("mr-lesions", folder / "3d", cases=size, size=40)),
            "2d": str(write_phantom("xray-nodules", folder / "2d", cases=2 * size, size=SIDE)),
        }, "phantoms (the real data are not there)"
    with (shared / "fed_isic_ham" / "cases.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))[: 96 if quick else 1024]
    rows = [
        {
            "image": str(shared / "fed_isic_ham" / "images" / f"{line['image_id']}.jpg"),
            "label": line["dx"],
            "patient": line["lesion_id"],
        }
        for line in lines
    ]
    volumes = hippocampus_cases(shared / "msd_hippocampus", folder, limit=12 if quick else 104)
    names = {"3d": str(volumes), "2d": str(write_table(folder / "isic.csv", rows))}
    return names, f"MSD hippocampus and {len(rows)} pictures of HAM10000 at {SIDE} px"


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
