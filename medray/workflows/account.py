"""Where a study's wall clock went: into training, into measuring, into its end, and into none of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medray.report.data import TimeRow
from medray.search.trial import TrialRecord

__all__ = ["ITSELF", "account"]

START = "start, and between stages"
SEARCH = "search"
TRAINING, MEASURING, ITSELF = "search: training", "search: measuring", "search: neither"


def account(
    stages: Mapping[str, float], spent: float, records: Sequence[TrialRecord], slots: int
) -> tuple[TimeRow, ...]:
    """All of the time, in parts that add up to it.

    What the search neither trained nor measured are processes that start, proposals, bookkeeping, and slots that wait
    for the last trial.

    Args:
        stages: seconds of each so far, the one that runs among them.
        spent: seconds of the whole study so far.
        records: its trials.
        slots: trials that ran at once.
    """
    parts = {START: max(0.0, spent - sum(stages.values()))}
    for name, seconds in stages.items():
        if name != SEARCH or not records:
            parts[name] = seconds
            continue
        trained = sum(record.seconds for record in records) / max(1, slots)
        measured = sum(record.measuring for record in records) / max(1, slots)
        rest = seconds - trained - measured
        # A sitting that was killed has booked no stage, but its trials are known.
        parts[START] = max(0.0, parts[START] + min(0.0, rest))
        parts |= {TRAINING: trained, MEASURING: measured, ITSELF: max(0.0, rest)}
    whole = max(spent, 1e-9)
    return tuple(TimeRow(name=name, seconds=seconds, share=seconds / whole) for name, seconds in parts.items())
