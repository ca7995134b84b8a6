"""What passes between a study, an engine and the function that trains one trial: small, picklable, no vendor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from medray.search.past import Proposal

Direction = Literal["max", "min"]
TrialState = Literal["running", "completed", "pruned", "failed"]
EventKind = Literal["started", "progress", "retried", "pruned", "completed", "failed"]


class TrialReport(TypedDict, total=False):
    """What a trial tells while it runs; it stays in the history. ``fraction``, ``step`` and ``metrics`` are needed."""

    fraction: float
    """Share of the trial's own schedule that is done, 0..1; the schedule may be another at the next report."""
    metrics: dict[str, float]
    """Validation metrics by name; the study's objectives among them."""
    step: int
    """Optimiser steps so far."""
    epoch: int
    seconds: float
    """Seconds of training so far."""
    costs: dict[str, float]
    """What it costs to run, by figure, as far as that is known."""
    measuring: float
    """Seconds that it took to find that out."""


Report = Callable[[TrialReport], bool]
"""Tells the study how the trial does; True asks the trial to stop and return at once."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """One trial to run.

    Args:
        number: the trial's number in the study; 0 is the default.
        params: path into the Experiment → value; for trial 0, the default's own values.
        directory: where the trial writes; kept when the trial is resumed, so that a checkpoint in it is found again.
        seed: differs between trials and stays the same when a trial is resumed.
        is_default: this is the plan's own default.
        seconds: what the trial may train for; None when the study has no clock.
        deadline: epoch seconds at which the search ends; a guard above ``seconds``.
        payload: whatever the workflow handed to the engine for all trials.
    """

    number: int
    params: Mapping[str, Any]
    directory: Path
    seed: int
    is_default: bool = False
    seconds: float | None = None
    deadline: float | None = None
    payload: Any = None


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """How a trial ended.

    Args:
        metrics: of the best validation; must hold each objective as a finite number.
        seconds: wall clock of the trial.
        stopped: ``deadline`` marks values of an unfinished schedule: the study counts such a trial as pruned, and one
            that was ``refused`` (it breaks a limit, so it was not trained) too.
        costs: what it costs to run, by figure, as far as that is known.
        measuring: seconds that it took to find that out, beside its training.
        extras: anything else worth keeping in the study, as JSON allows it.
    """

    metrics: Mapping[str, float]
    seconds: float = 0.0
    stopped: Literal["finished", "early", "pruned", "deadline", "refused"] = "finished"
    costs: Mapping[str, float] = field(default_factory=dict)
    measuring: float = 0.0
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as the study knows it."""

    number: int
    state: TrialState
    params: Mapping[str, Any]
    is_default: bool
    in_space: bool
    """False for a default that the space does not contain: the sampler never saw it."""
    metrics: Mapping[str, float]
    """Of the outcome; of the last report for a trial that gave none."""
    values: tuple[float, ...] | None
    """The objectives in the study's order; None unless completed."""
    fraction: float
    """Share of the schedule that was reached."""
    seconds: float
    stopped: str
    history: tuple[Mapping[str, Any], ...]
    """The reports, oldest first."""
    extras: Mapping[str, Any]
    error: str | None
    directory: Path
    constraints: Mapping[str, float] = field(default_factory=dict)
    """Limit of today → by what share of it the trial breaks it; 0 or less where it is kept. Empty where none is set."""
    measuring: float = 0.0
    """Seconds that it took to find out what it costs to run."""
    ended: float | None = None
    """Seconds that the study had been open when the trial ended."""
    losses: tuple[str, ...] = ()
    """The machines with which the trial's process was lost; it was run again after each."""
    proposal: Proposal | None = None
    """Where its parameters come from, if an earlier study found them."""

    @property
    def feasible(self) -> bool:
        """Whether it keeps every limit, as far as that is known."""
        return all(value <= 0 for value in self.constraints.values())


@dataclass(frozen=True, kw_only=True)
class TrialEvent:
    """Something that happened to a trial, for a live table."""

    kind: EventKind
    number: int
    params: Mapping[str, Any]
    fraction: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""


TrialFunction = Callable[[TrialTask, Report], TrialOutcome]
"""Trains one trial. Must be importable by name (a module's own function): it runs in another process."""
