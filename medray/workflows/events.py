"""What a study or a training run tells while it goes on; the command line, a notebook or a web page shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "stage",
    "trial-started",
    "trial-progress",
    "trial-completed",
    "trial-pruned",
    "trial-failed",
    "note",
    "done",
]


@dataclass(frozen=True, kw_only=True)
class StudyEvent:
    """One thing that happened.

    Attributes:
        kind: what; ``stage`` begins a part of the flow, ``note`` is said once, ``done`` is the last.
        text: for a person, one line; of a failed trial the worker's own error.
        trial: its number, where the event is about one.
        fraction: 0..1 of the trial's (or the run's) schedule, where known.
        metrics: what was measured.
        best: the first objective's best value so far.
        elapsed: seconds since the start.
        budget: seconds for all of it; None where there is no limit.
        expected_gain: what the search is still expected to add to ``best``, in its units; None where unknown.
    """

    kind: Kind
    text: str = ""
    trial: int | None = None
    fraction: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: float | None = None
    elapsed: float = 0.0
    budget: float | None = None
    expected_gain: float | None = None


Observer = Callable[[StudyEvent], None]
