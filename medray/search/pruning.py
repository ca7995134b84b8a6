"""When to stop a trial early. Pure functions of what all trials have reported so far.

A curve is a trial's reports, oldest first, as (fraction of its schedule, losses): losses are (M,), lower is better, one
for each objective that can be known during training. With several objectives "among the best k" means: fewer than k
trials lie on better non-dominated fronts. The default trial is never stopped; the driver sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np

from medray.search.pareto import Floats, non_dominated_rank

Curve = Sequence[tuple[float, tuple[float, ...]]]
Curves = Mapping[int, Curve]
Rule = Callable[[Curves, int, Container[int]], bool]
"""(all curves, the trial that has just reported, the trials that have ended) → whether to stop it."""

REDUCTION = 3
RUNGS = (1 / 9, 1 / 3)
"""Fractions at which ASHA compares; the third rung is the end of the schedule."""
MEDIAN_TRIALS = 4
"""Other trials that there must be before the median rule speaks."""
CURVE_BEGINS = 1 / 3
"""Fraction from which on curves are extended."""
_TOLERANCE = 1e-9


def asha(curves: Curves, number: int, ended: Container[int] = ()) -> bool:  # noqa: ARG001 (a rule's signature)
    """Whether to stop ``number``, which has just reported: asynchronous successive halving, stopping form.

    At each rung the trial goes on only if it is among the best ``max(1, n // 3)`` of the n trials that have come that
    far until now, itself included (Li et al. 2020, "A system for massively parallel hyperparameter tuning").
    """
    for rung in _crossed(curves[number]):
        others = [losses for other in curves if other != number and (losses := _at(curves[other], rung)) is not None]
        own = _at(curves[number], rung)
        assert own is not None  # the trial has just crossed it
        keep = max(1, (len(others) + 1) // REDUCTION)
        if _better(own, others) >= keep:
            return True
    return False


def median(curves: Curves, number: int, ended: Container[int] = ()) -> bool:
    """Whether to stop ``number``, which has just reported: worse than the median of the others at this stage.

    Both sides count their best report until this stage (single objective) or their latest (several). Others are those
    that have come as far, and those stopped before: without the latter, each stage would halve the survivors of the
    former. Silent before the first rung and for fewer than ``MEDIAN_TRIALS`` others (after Golovin et al. 2017).
    """
    fraction = curves[number][-1][0]
    if fraction < RUNGS[0] - _TOLERANCE:
        return False
    others = [
        losses
        for other, curve in curves.items()
        if other != number and curve and (other in ended or curve[-1][0] >= fraction - _TOLERANCE)
        if (losses := _until(curve, fraction)) is not None
    ]
    own = _until(curves[number], fraction)
    if len(others) < MEDIAN_TRIALS or own is None:
        return False
    return _better(own, others) > len(others) / 2


def curve(curves: Curves, number: int, ended: Container[int] = ()) -> bool:  # noqa: ARG001 (a rule's signature)
    """Whether to stop ``number``, which has just reported: going on at its pace it would still end behind another.

    The pace is that of the latter half of what it has run, from its best report then to its best now. Curves flatten,
    so at the end of its schedule a trial that kept its pace would be better than it will be; where another has already
    been better than that, in every objective, nothing can be gained. Silent before a third of the schedule, whose first
    steps rank networks by how soon they leave their first weights. (Linear, where Domhan et al. 2015 fit families of
    curves: a trial of a small study has a handful of reports.)
    """
    ahead = _extrapolated(curves[number])
    if ahead is None:
        return False
    others = [losses for other, points in curves.items() if other != number for _, losses in points]
    if not others:
        return False
    reached: Floats = np.asarray(others, dtype=np.float64)
    reached = np.where(np.isnan(reached), np.inf, reached)
    return bool(((reached <= ahead).all(axis=1) & (reached < ahead).any(axis=1)).any())


def never(curves: Curves, number: int, ended: Container[int] = ()) -> bool:  # noqa: ARG001 (a rule's signature)
    """No trial is stopped early."""
    return False


RULES: dict[str, Rule] = {"asha": asha, "median": median, "curve": curve, "none": never}


def replanned(history: Sequence[Mapping[str, Any]], step: int, fraction: float) -> list[dict[str, Any]]:
    """The earlier reports of a trial that stands at ``step``, which is ``fraction`` of its schedule as it now is.

    A resumed trial goes back to its checkpoint: what it reported from ``step`` on did not happen. And a plan of steps
    may be corrected while it runs (see :mod:`medray.train.pace`): then the same steps are another share of it.
    """
    return [{**entry, "fraction": entry["step"] * fraction / step} for entry in history if 0 <= entry["step"] < step]


def _extrapolated(points: Curve) -> Floats | None:
    """Losses (M,) at the end of a trial's schedule, at its pace; None too early to say, and at the end itself."""
    fraction = points[-1][0]
    half = [index for index, (at, _) in enumerate(points[:-1]) if at <= fraction / 2 + _TOLERANCE]
    if not half or fraction < CURVE_BEGINS - _TOLERANCE or fraction > 1 - _TOLERANCE:
        return None
    losses: Floats = np.asarray([losses for _, losses in points], dtype=np.float64)
    best = np.minimum.accumulate(np.where(np.isnan(losses), np.inf, losses))
    with np.errstate(invalid="ignore"):  # nothing finite yet
        pace = (best[half[-1]] - best[-1]) / (fraction - points[half[-1]][0])
        return np.where(np.isfinite(best[-1]), best[-1] - pace * (1.0 - fraction), np.inf)


def _crossed(curve: Curve) -> list[float]:
    """Rungs that the latest report is the first to reach."""
    before = curve[-2][0] if len(curve) > 1 else -math.inf
    return [rung for rung in RUNGS if before < rung - _TOLERANCE <= curve[-1][0]]


def _at(curve: Curve, rung: float) -> tuple[float, ...] | None:
    """Losses of the first report at or beyond the rung."""
    return next((losses for fraction, losses in curve if fraction >= rung - _TOLERANCE), None)


def _until(curve: Curve, fraction: float) -> tuple[float, ...] | None:
    reached = [losses for at, losses in curve if at <= fraction + _TOLERANCE]
    if not reached:
        return None
    return min(reached) if len(reached[-1]) == 1 else reached[-1]


def _better(own: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> int:
    """How many of the others lie on a better front (for one objective: are strictly better)."""
    points: Floats = np.asarray([own, *others], dtype=np.float64)
    points = np.where(np.isnan(points), np.inf, points)
    ranks = non_dominated_rank(points)
    return int((ranks[1:] < ranks[0]).sum())
