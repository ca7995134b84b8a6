"""What runs inside a worker: one trial of a study, or one final fit. Called by the engine, by name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medray import logs
from medray.search.trial import Report, TrialOutcome, TrialTask
from medray.train.precision import resolve_device
from medray.train.progress import Progress
from medray.workflows.judging import Direction, predictor_of
from medray.workflows.recipe import Recipe
from medray.workflows.training import Trained, open_store, train_model

COSTS = ("latency_ms", "parameters", "peak_memory_mb", "seconds")
"""Objectives that every task has besides its own ``val/`` metrics."""


@dataclass(frozen=True, kw_only=True)
class TrialPayload:
    """What every trial of a study is handed."""

    recipe: Recipe
    objective: tuple[str, Direction]
    costs: tuple[str, ...] = ()


def run_trial(task: TrialTask, report: Report) -> TrialOutcome:
    """Train one trial in its folder; where it was interrupted there, go on.

    Args:
        task: number, parameters, folder and seconds; its payload is a :class:`TrialPayload`.
        report: takes metrics at each validation; True means that the trial is to stop.
    """
    payload: TrialPayload = task.payload
    params = {} if task.is_default else task.params
    experiment = payload.recipe.experiment(params, budget=task.seconds)

    def on_validation(progress: Progress) -> bool:
        return report(
            {
                "fraction": progress.fraction,
                "metrics": dict(progress.metrics),
                "step": progress.step,
                "epoch": progress.epoch,
                "seconds": progress.seconds,
            }
        )

    # The schedule is made to end in time; the deadline is for what nobody foresaw.
    now = time.monotonic()
    limits = [now + 1.25 * task.seconds + 10] if task.seconds else []
    if task.deadline is not None:
        limits.append(now + task.deadline - time.time())
    trained = train_model(
        payload.recipe,
        experiment,
        Path(task.directory),
        objective=payload.objective,
        on_validation=on_validation,
        deadline=min(limits, default=None),
    )
    metrics = dict(trained.fit.best)
    metrics["seconds"] = trained.fit.seconds
    metrics["peak_memory_mb"] = trained.fit.peak_memory_mb
    metrics["parameters"] = float(sum(p.numel() for p in trained.model.parameters()))
    if "latency_ms" in payload.costs:
        metrics["latency_ms"] = latency_ms(payload.recipe, trained)
    return TrialOutcome(metrics=metrics, seconds=trained.fit.seconds, stopped=trained.fit.stopped)


def latency_ms(recipe: Recipe, trained: Trained, *, repeats: int = 7) -> float:
    """Median milliseconds of one forward pass of one patch, batch 1, after a warm-up, on this machine."""
    store = open_store(recipe, trained.experiment)
    image = np.asarray(store.image(0), dtype=np.float32)
    patch = trained.experiment.train.patch_size or image.shape[1:]
    batch = np.zeros((1, image.shape[0], *patch), dtype=np.float32)
    predictor = predictor_of(trained.model, trained.experiment, resolve_device(trained.experiment.device))
    predictor(batch)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        predictor(batch)
        times.append(time.perf_counter() - begun)
    return float(np.median(times) * 1000)


@dataclass(frozen=True, kw_only=True)
class FinalTask:
    """One finalist to train with what remains of the budget.

    Attributes:
        recipe, params, objective: as for trials.
        directory: of this run.
        seconds: to train for; the schedule is laid to end then.
        deadline: epoch seconds at which it stops in any case.
        twin: 0 for the experiment itself, n for its n-th twin with another seed.
        cpus: that it may compute with.
    """

    recipe: Recipe
    params: Mapping[str, Any]
    objective: tuple[str, Direction]
    directory: str
    seconds: float
    deadline: float
    twin: int = 0
    cpus: int | None = None


def run_final(task: FinalTask) -> None:
    """Train a finalist; its files lie in its folder. A second call goes on where the first was interrupted."""
    begun = time.time()
    logs.bind(final=Path(task.directory).name)
    experiment = task.recipe.experiment(task.params, budget=max(1.0, task.seconds), twin=task.twin)
    train_model(
        task.recipe,
        experiment,
        Path(task.directory),
        objective=task.objective,
        deadline=time.monotonic() + max(1.0, task.deadline - begun),
        cpus=task.cpus,
    )
