"""From a crowning to what the report and ``result.json`` show of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medray.learn.intervals import Interval as Estimate
from medray.report.data import ChoiceRow, FrontPoint, Interval, SelectionSummary
from medray.search import pareto
from medray.search.selection import ACCURACY, Chooser, Ranked
from medray.search.trial import Direction, TrialRecord
from medray.workflows.selecting import Crowning, figures_of

__all__ = ["plain", "selection_summary"]


def selection_summary(
    crowning: Crowning, chooser: Chooser, objective: tuple[str, Direction], records: Sequence[TrialRecord]
) -> SelectionSummary:
    """The table of candidates, why the first of them won, and the trade-off in a picture."""
    first, limits = crowning.ranked[0], chooser.select.limits.given
    shown = list(dict.fromkeys([ACCURACY, *limits, *chooser.objectives, *(chooser.needs & set(_costs(crowning)))]))
    rows = tuple(_row(found, found is first, shown, crowning, chooser, objective[0]) for found in crowning.ranked)
    axes, points = _front(crowning, chooser, objective[0], records)
    return SelectionSummary(
        rule=chooser.rule,
        why=crowning.why,
        remark=_remark(first, limits),
        measured=tuple(dict.fromkeys(costs.shown for costs in crowning.costs.values())),
        limits={_shown(name, objective[0]): limit for name, limit in limits.items()},
        rows=rows,
        axes=tuple(_shown(name, objective[0]) for name in axes),
        points=points,
        directions=tuple(chooser.objectives[name] for name in axes),
        hypervolume=_hypervolume(chooser, objective[0], records),
    )


def plain(crowning: Crowning, chooser: Chooser) -> dict[str, Any]:
    """For ``result.json``: no NaN, nothing but JSON."""
    return {
        "rule": chooser.rule,
        "why": crowning.why,
        "limits": chooser.select.limits.given,
        "candidates": [
            {
                "name": found.option.name,
                "refused": found.refused,
                "broken": [verdict.name for verdict in found.broken],
                "merit": _number(found.merit),
                "figures": {
                    name: [_number(value) for value in figure] for name, figure in sorted(found.option.figures.items())
                },
                "measured": crowning.costs[found.option.name].shown if found.option.name in crowning.costs else None,
                "reason": crowning.reasons.get(found.option.name),
            }
            for found in crowning.ranked
        ],
    }


def _shown(name: str, objective: str) -> str:
    """A figure as a reader of the report knows it: the study's metric by its own name."""
    return objective if name == ACCURACY else name


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _costs(crowning: Crowning) -> list[str]:
    return [name for found in crowning.ranked for name in found.option.figures]


def _interval(found: Estimate) -> Interval:
    return Interval(value=found.value, low=found.low, high=found.high)


def _row(
    found: Ranked, chosen: bool, shown: Sequence[str], crowning: Crowning, chooser: Chooser, objective: str
) -> ChoiceRow:
    name, figures = found.option.name, found.option.figures
    merit = "" if found.merit is None or not math.isfinite(found.merit) else f"{found.merit:.4g}"
    note = crowning.reasons.get(name, "")
    if not note and found.on_front is False and not found.refused:
        note = "another one beats it in every objective"
    return ChoiceRow(
        name=name,
        chosen=chosen,
        refused=found.refused,
        figures={_shown(key, objective): _interval(figures[key]) for key in shown if key in figures},
        kept={_shown(verdict.name, objective): verdict.kept for verdict in found.verdicts},
        merit=f"{merit} of 100" if merit and chooser.rule == "scorecard" else merit,
        note=note,
    )


def _remark(first: Ranked, limits: dict[str, float]) -> str:
    if not limits:
        return ""
    if not first.broken:
        return f"; keeps {_and([f'{name} ({limit:g})' for name, limit in limits.items()])}"
    return f"; BREAKS {_and([f'{verdict.name} ({verdict.limit:g})' for verdict in first.broken])}"


def _and(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _ended(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Completed trials in the order in which they ended."""
    completed = [record for record in records if record.values is not None]
    return sorted(completed, key=lambda record: (record.ended or 0.0, record.number))


def _losses(chooser: Chooser, objective: str, records: Sequence[TrialRecord]) -> pareto.Floats:
    nothing = Estimate(math.nan, math.nan, math.nan)
    rows = [figures_of(record, objective) for record in records]
    values = [[row.get(name, nothing).value for name in chooser.objectives] for row in rows]
    return pareto.losses(values, list(chooser.objectives.values()))


def _front(
    crowning: Crowning, chooser: Chooser, objective: str, records: Sequence[TrialRecord]
) -> tuple[tuple[str, ...], tuple[FrontPoint, ...]]:
    """The first two objectives of every completed trial, and of the champion as it was fitted in the end."""
    axes = tuple(chooser.objectives)[:2]
    completed = _ended(records)
    if len(axes) < 2 or not completed:
        return (), ()
    losses = _losses(chooser, objective, completed)
    feasible = np.asarray([record.feasible for record in completed])
    judged = np.where(feasible[:, None], losses, np.inf) if feasible.any() else losses
    members = set(pareto.front(judged))
    points = []
    for index, record in enumerate(completed):
        figures = figures_of(record, objective)
        x, y = (figures[name].value if name in figures else math.nan for name in (axes[1], axes[0]))
        on_front = index in members and bool(feasible[index] or not feasible.any())
        points.append(FrontPoint(name=f"trial {record.number}", x=x, y=y, on_front=on_front, feasible=record.feasible))
    first = crowning.ranked[0].option
    x, y = (first.figures[name].value if name in first.figures else math.nan for name in (axes[1], axes[0]))
    feasible_now = not crowning.ranked[0].broken
    points.append(FrontPoint(name=first.name, x=x, y=y, on_front=False, feasible=feasible_now, champion=True))
    return axes, tuple(point for point in points if math.isfinite(point.x) and math.isfinite(point.y))


def _hypervolume(chooser: Chooser, objective: str, records: Sequence[TrialRecord]) -> tuple[tuple[float, float], ...]:
    """Seconds of the search to the hypervolume of the trials that had ended by then; those beyond a limit add none."""
    completed = [record for record in _ended(records) if record.ended is not None]
    if len(chooser.objectives) < 2 or len(completed) < 2:
        return ()
    losses = _losses(chooser, objective, completed)
    feasible = np.asarray([record.feasible for record in completed])
    volumes = pareto.normalised_hypervolume(np.where(feasible[:, None], losses, np.inf))
    return tuple((float(record.ended or 0.0), float(v)) for record, v in zip(completed, volumes, strict=True))
