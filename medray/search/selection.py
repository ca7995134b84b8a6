"""Who may be champion, and who of those is: limits on what a model costs to run, and the rules of choice.

Figures go by name: ``accuracy`` is the study's own metric (whatever it is called), other metrics and costs go by their
own names without ``val/``. A cost keeps its limit if the upper end of its 95 % interval does; accuracy by its value,
since the intervals of a few validation cases are wide enough to refuse every model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from medray.config.selection import LimitsConfig, SelectConfig
from medray.learn.intervals import Interval
from medray.search import pareto
from medray.search.trial import Direction

ACCURACY = "accuracy"
MEASURED = ("latency_ms", "latency_p95_ms", "memory_mb", "size_mb")
"""Costs that have to be measured on the exported model."""
POINTS: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "accuracy": (40.0, (ACCURACY,)),
    "speed": (30.0, ("latency_ms", "latency_p95_ms")),
    "memory": (20.0, ("memory_mb",)),
    "size": (10.0, ("size_mb", "parameters")),
}
"""The scorecard: what each part is worth, and the limits that it is held by. A part without a limit is given."""

Figures = Mapping[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One limit, and what a model does to it.

    Attributes:
        excess: by what share of the limit it is broken; 0 where it is kept, infinite where nothing was measured.
    """

    name: str
    limit: float
    excess: float

    @property
    def kept(self) -> bool:
        """Whether the model stays within it."""
        return self.excess <= 0.0


@dataclass(frozen=True, kw_only=True)
class Option:
    """A model that could be the champion.

    Attributes:
        tie: decides between equals, larger first.
    """

    name: str
    figures: Figures
    tie: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """An option in its place.

    Attributes:
        verdicts: on each limit that is set.
        refused: may not be the champion.
        merit: what the rule gave: points, the expression's value, the distance to the ideal; None for the metric alone.
        on_front: no other eligible option beats it in everything; None for other rules.
    """

    option: Option
    verdicts: tuple[Verdict, ...]
    refused: bool
    merit: float | None = None
    on_front: bool | None = None

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The limits that it breaks."""
        return tuple(verdict for verdict in self.verdicts if not verdict.kept)


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """The rule of a study.

    Args:
        select: as configured.
        objectives: figure name → ``max`` or ``min``; ``accuracy`` first for the study's metric.
    """

    select: SelectConfig
    objectives: Mapping[str, Direction] = field(default_factory=lambda: {ACCURACY: "max"})

    @property
    def rule(self) -> str:
        """What ``auto`` stands for, or the rule that was asked for."""
        if self.select.rule != "auto":
            return self.select.rule
        return "pareto" if len(self.objectives) > 1 else "best"

    @property
    def needs(self) -> frozenset[str]:
        """Figures that the choice looks at."""
        formula = self.select.formula
        return frozenset([*self.objectives, *self.select.limits.given, *(formula.names if formula else ())])

    @property
    def is_plain(self) -> bool:
        """Whether the metric alone decides, without any limit."""
        return self.rule == "best" and not self.select.limits.given

    def judge(self, figures: Figures) -> tuple[Verdict, ...]:
        """Each limit against what was measured."""
        found = []
        for name, limit in self.select.limits.given.items():
            measured = figures.get(name)
            if measured is None or math.isnan(measured.value):
                excess = math.inf
            elif name == ACCURACY:
                missing = limit - measured.value if self.direction == "max" else measured.value - limit
                excess = missing / (abs(limit) or 1.0)
            else:
                excess = (upper(measured) - limit) / limit
            found.append(Verdict(name=name, limit=limit, excess=max(0.0, excess)))
        return tuple(found)

    def constraints(self, values: Mapping[str, float]) -> dict[str, float]:
        """By what share of it each limit on a cost is broken, 0 or less where it is kept; of costs that are known.

        That on accuracy is left out: a trial that trained for a part of the time says little of it.
        """
        limits = {name: limit for name, limit in self.select.limits.given.items() if name != ACCURACY}
        return {name: (values[name] - limit) / limit for name, limit in limits.items() if name in values}

    def without_limits(self) -> Chooser:
        """The same rule without any limit."""
        return Chooser(select=self.select.model_copy(update={"limits": LimitsConfig()}), objectives=self.objectives)

    def for_search(self) -> Chooser:
        """The same without the limit on accuracy, for trials."""
        limits = self.select.limits.model_copy(update={ACCURACY: None})
        return Chooser(select=self.select.model_copy(update={"limits": limits}), objectives=self.objectives)

    @property
    def direction(self) -> Direction:
        """Of the study's metric."""
        return self.objectives.get(ACCURACY, "max")

    def rank(self, options: Sequence[Option], *, reference: Sequence[Figures] = ()) -> list[Ranked]:
        """The options, best first; refused ones come last.

        Args:
            options: whom to choose from.
            reference: further models that set the scale by which ``pareto`` measures distances, such as the trials.
        """
        judged = [(option, self.judge(option.figures)) for option in options]
        eligible = [
            option for option, verdicts in judged if not (self.select.refuses and any(v.excess for v in verdicts))
        ]
        merits, front = self._merits(options, eligible, reference)
        ranked = []
        for option, verdicts in judged:
            refused = option not in eligible
            ranked.append(
                Ranked(
                    option=option,
                    verdicts=verdicts,
                    refused=refused,
                    merit=merits.get(option.name),
                    on_front=option.name in front if self.rule == "pareto" else None,
                )
            )
        return sorted(ranked, key=self._place)

    def _place(self, found: Ranked) -> tuple[float, ...]:
        """What the options are sorted by, smallest first."""
        excess = sum(verdict.excess for verdict in found.verdicts)
        # By scorecard a broken limit costs its points, unless it refuses.
        behind = excess if self.rule != "scorecard" or found.refused else 0.0
        merit = math.inf if found.merit is None or math.isnan(found.merit) else found.merit
        worth = {"best": 0.0, "pareto": merit}.get(self.rule, -merit if math.isfinite(merit) else math.inf)
        fronts = 0.0 if found.on_front is not False else 1.0
        return (float(found.refused), behind, fronts, worth, self._loss(found.option), -found.option.tie)

    def _loss(self, option: Option) -> float:
        measured = option.figures.get(ACCURACY)
        if measured is None or math.isnan(measured.value):
            return math.inf
        return round(measured.value, 6) * (-1.0 if self.direction == "max" else 1.0)

    def _merits(
        self, options: Sequence[Option], eligible: Sequence[Option], reference: Sequence[Figures]
    ) -> tuple[dict[str, float], frozenset[str]]:
        if self.rule == "scorecard":
            return {option.name: self.points(option.figures) for option in options}, frozenset()
        formula = self.select.formula
        if self.rule == "weighted" and formula is not None:
            return {o.name: formula.value({n: f.value for n, f in o.figures.items()}) for o in options}, frozenset()
        if self.rule != "pareto" or not eligible:
            return {}, frozenset()
        points = self._points([option.figures for option in eligible])
        scale = points if not reference else np.concatenate([points, self._points(reference)])
        members = pareto.front(points)
        distances = pareto.distances(points, scale)
        merits = {option.name: float(distances[i]) for i, option in enumerate(eligible)}
        return merits, frozenset(eligible[index].name for index in members)

    def _points(self, rows: Sequence[Figures]) -> pareto.Floats:
        nothing = Interval(math.nan, math.nan, math.nan)
        values = [[row.get(name, nothing).value for name in self.objectives] for row in rows]
        return pareto.losses(values, list(self.objectives.values()))

    def points(self, figures: Figures) -> float:
        """The scorecard: 100 at most."""
        kept = {verdict.name: verdict.kept for verdict in self.judge(figures)}
        return sum(worth for worth, names in POINTS.values() if all(kept.get(name, True) for name in names))


def upper(found: Interval) -> float:
    """The upper end of an interval; the value where there is none."""
    return found.value if math.isnan(found.high) else max(found.value, found.high)


def exact(value: float) -> Interval:
    """A figure that is counted rather than measured."""
    return Interval(float(value), float(value), float(value))


def explain(chooser: Chooser, ranked: Sequence[Ranked], metric: str) -> str:
    """Why the first of the ranked is the champion, in a sentence or two."""
    first = ranked[0]
    refused = [found for found in ranked if found.refused and all(math.isfinite(v.excess) for v in found.verdicts)]
    limits = chooser.select.limits.given
    among = "of the candidates"
    if limits:
        kept = sum(1 for found in ranked if not found.broken)
        among = f"of the candidates that are known to keep every limit ({kept} of {len(ranked)})"
    merit = math.nan if first.merit is None else first.merit
    named = [metric if name == ACCURACY else name for name in chooser.objectives]
    reasons = {
        "best": f"it has the best {metric} {among}",
        "pareto": f"it lies nearest to the ideal point of {', '.join(named)} {among}, and none of them "
        "beats it in all of these",
        "scorecard": f"it has the most points ({merit:.0f} of 100), {metric} deciding between equals",
        "weighted": f"{chooser.select.expression} is largest for it ({merit:.4g}) {among}",
    }
    text = f"{first.option.name}: {reasons[chooser.rule]}."
    if first.broken:
        figures = first.option.figures
        names = ", ".join(
            f"{v.name} ({f'{figures[v.name].value:.4g}' if v.name in figures else 'not measured'}, limit {v.limit:g})"
            for v in first.broken
        )
        rest = "" if chooser.rule == "scorecard" else " No candidate keeps every limit; it breaks them least."
        text = f"{text if chooser.rule == 'scorecard' else first.option.name + '.'}{rest} It breaks: {names}."
    if refused:
        text += f" Refused: {', '.join(found.option.name for found in refused)}."
    return text
