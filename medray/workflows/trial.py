"""What runs inside a worker: one trial of a study, or one final fit. Called by the engine, by name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray import logs
from medray.config.schema import Experiment
from medray.config.selection import SelectConfig
from medray.errors import BundleError
from medray.search.selection import MEASURED, Chooser
from medray.search.trial import Report, TrialOutcome, TrialTask
from medray.tasks.task import Direction
from medray.train.progress import Progress
from medray.workflows.champion import Candidate
from medray.workflows.costs import Costs, costs_of, untrained
from medray.workflows.recipe import Recipe
from medray.workflows.training import train_model

COSTS = (*MEASURED, "parameters", "peak_memory_mb", "seconds")
"""Objectives that every task has besides its own ``val/`` metrics: what the model costs to run, what training took."""
FOLDER = "costs"
"""Of a study: what its architectures cost, as measured."""


_WHOLE = 0.95
"""Share of a trial's seconds that its schedule needs, so that its value compares with others'."""
_PLAIN = Chooser(select=SelectConfig())


@dataclass(frozen=True, kw_only=True)
class TrialPayload:
    """What every trial of a study is handed.

    Attributes:
        objectives: of the study, by name; those among them that are known beforehand stand in each report.
        chooser: whose limits a trial is held to.
    """

    recipe: Recipe
    objective: tuple[str, Direction]
    objectives: tuple[str, ...] = ()
    chooser: Chooser = _PLAIN


def run_trial(task: TrialTask, report: Report) -> TrialOutcome:
    """Train one trial in its folder; where it was interrupted there, go on.

    What it costs to run is measured first, where somebody asked: one that surely breaks a limit isn't trained.

    Args:
        task: number, parameters, folder and seconds; its payload is a :class:`TrialPayload`.
        report: takes metrics at each validation; True means that the trial is to stop.
    """
    payload: TrialPayload = task.payload
    params = {} if task.is_default else task.params
    experiment = payload.recipe.experiment(params, budget=task.seconds)
    began = time.monotonic()
    costs, figures = _costs_before(payload, experiment, needed=not task.is_default)
    measuring = time.monotonic() - began
    if not task.is_default and payload.chooser.select.refuses:  # without the default no gain could be stated
        limits = payload.chooser.select.limits.given
        broken = costs.surely_breaks(limits) if costs else _over(payload.chooser, figures)
        if broken:
            extras = {"refused": sorted(broken), **_extras(costs)}
            return TrialOutcome(metrics=figures, stopped="refused", costs=figures, measuring=measuring, extras=extras)
    is_short = False
    known = {name: figures[name] for name in payload.objectives if name in figures}
    if task.seconds is not None and task.deadline is not None and time.time() + task.seconds > task.deadline:
        # Measuring took a part of its time; the schedule has to end with the search.
        remains = max(1.0, task.deadline - time.time())
        experiment = payload.recipe.experiment(params, budget=remains)
        is_short = remains < _WHOLE * task.seconds

    def on_validation(progress: Progress) -> bool:
        return report(
            {
                "fraction": progress.fraction,
                "metrics": {**progress.metrics, **known},
                "step": progress.step,
                "epoch": progress.epoch,
                "seconds": progress.seconds,
                "costs": figures,
                "measuring": measuring,
            }
        )

    # The schedule is made to end in time; the deadline is for what nobody foresaw.
    now = time.monotonic()
    limit = [now + 1.25 * task.seconds + 10] if task.seconds else []
    if task.deadline is not None:
        limit.append(now + task.deadline - time.time())
    trained = train_model(
        payload.recipe,
        experiment,
        Path(task.directory),
        objective=payload.objective,
        on_validation=on_validation,
        deadline=min(limit, default=None),
    )
    if costs is not None and costs.fallen is not None and trained.fit.stopped in ("finished", "early"):
        # With random weights some engine did not agree with the golden outputs; with these it may.
        folder, began = Path(payload.recipe.directory) / FOLDER, time.monotonic()
        costs = costs_of(payload.recipe, Candidate(name="trained", members=(trained,)), folder)
        figures, measuring = costs.values, measuring + time.monotonic() - began
    figures = {**figures, "parameters": float(sum(p.numel() for p in trained.model.parameters()))}
    training = {"seconds": trained.fit.seconds, "peak_memory_mb": trained.fit.peak_memory_mb}
    return TrialOutcome(
        metrics={**trained.fit.best, **figures, **training},
        seconds=trained.fit.seconds,
        # A shorter schedule is another experiment: its value must not stand among those of whole ones.
        stopped="deadline" if is_short and trained.fit.stopped == "finished" else trained.fit.stopped,
        costs=figures,
        measuring=measuring,
        extras=_extras(costs),
    )


def _over(chooser: Chooser, figures: Mapping[str, float]) -> set[str]:
    return {name for name, excess in chooser.constraints(figures).items() if excess > 0}


def _costs_before(
    payload: TrialPayload, experiment: Experiment, *, needed: bool
) -> tuple[Costs | None, dict[str, float]]:
    """What is known of a trial before it is trained, as far as objectives, limits or the rule ask for it.

    One that is not ``needed`` (trial 0's) may fail: it has a quiet look later.
    """
    needs = payload.chooser.needs
    if needs & set(MEASURED):
        folder = Path(payload.recipe.directory) / FOLDER
        try:
            costs = costs_of(payload.recipe, untrained(payload.recipe, experiment), folder, trained=False)
        except BundleError:
            if needed:
                raise
            return None, {}
        return costs, costs.values
    if "parameters" in needs:
        model = untrained(payload.recipe, experiment).lead.model
        return None, {"parameters": float(sum(p.numel() for p in model.parameters()))}
    return None, {}


def _extras(costs: Costs | None) -> dict[str, Any]:
    return {} if costs is None else {"measured": costs.shown, "others": costs.others}


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
