"""From a study's limits and rule to the trial that is fitted to the end, and to the candidate that is crowned.

What costs decide on is looked at again when nothing else of the study runs: trials' architectures before the final fit,
the winner with its very weights before it is crowned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from medray.config.schema import StudyConfig
from medray.errors import ConfigError, MedrayError, StudyError
from medray.learn.intervals import Interval, bootstrap
from medray.search.selection import ACCURACY, MEASURED, Chooser, Option, Ranked, exact, explain
from medray.search.trial import Direction, TrialRecord
from medray.workflows.champion import Candidate, Scores
from medray.workflows.costs import Costs, costs_of, untrained
from medray.workflows.recipe import Recipe
from medray.workflows.training import Trained, load_trained
from medray.workflows.trial import COSTS, FOLDER

SHARE = 0.1
"""Of a study's budget that quiet looks may take, once one model is known to keep the limits."""
UNDISTURBED = 0.1
"""Share of the CPU that other programs may take while something is measured."""
ONE_LOOK = 20.0
"""Seconds that a quiet look takes where none has been taken yet."""
LOOKED = 1.0
"""Seconds beyond which something was measured: what is remembered costs nothing."""
Tell = Callable[[str], None]


def figure_name(name: str, objective: str) -> str:
    """An objective's or metric's name as limits and expressions know it."""
    if name == objective:
        return ACCURACY
    short = name.removeprefix("val/")
    return name if short == ACCURACY else short


def make_chooser(
    study: StudyConfig, objectives: Mapping[str, Direction], objective: tuple[str, Direction], metrics: Sequence[str]
) -> Chooser:
    """The rule of a study.

    Args:
        study: what was asked for.
        objectives: of the study.
        objective: its metric, and direction.
        metrics: that are measured for the task, such as ``val/auc``.

    Raises:
        ConfigError: the expression names a figure that there is not, or ``pareto`` has a single objective.
    """
    named = {figure_name(name, objective[0]): way for name, way in objectives.items()}
    chooser = Chooser(select=study.select, objectives={ACCURACY: objective[1]} | named)
    formula = study.select.formula
    known = list(dict.fromkeys([ACCURACY, *(figure_name(name, objective[0]) for name in metrics), *COSTS]))
    for name in formula.names if formula else ():
        if name not in known:
            raise ConfigError(
                f"study.select.expression: there is no figure {name!r}. There are: {', '.join(known)}; {ACCURACY} is "
                f"the study's metric, {objective[0]}"
            )
    if chooser.rule == "pareto" and len(chooser.objectives) < 2:
        raise ConfigError(
            f"study.select.rule=pareto with one objective, {objective[0]}: it weighs several. Add one, such as "
            "study.objectives.latency_ms=min, or take select.rule=best"
        )
    return chooser


def figures_of(record: TrialRecord, objective: str) -> dict[str, Interval]:
    """What a trial came to, by the names that a chooser knows."""
    return {figure_name(name, objective): exact(value) for name, value in record.metrics.items()}


@dataclass(kw_only=True)
class Quiet:
    """Looks at costs while nothing else of the study runs, within a share of its budget.

    Attributes:
        recipe: of the study.
        budget: seconds of the study.
        tell: hears what is being measured.
        spare: seconds that may go to looks now, whatever their share of the budget.
        spent, looks: so far.
        rehearsed: the look at the default before the search, outside the share.
    """

    recipe: Recipe
    budget: float
    tell: Tell
    spare: Callable[[], float] = lambda: math.inf
    spent: float = 0.0
    looks: int = 0
    rehearsed: Costs | None = None

    @property
    def folder(self) -> Path:
        """Of remembered costs."""
        return Path(self.recipe.directory) / FOLDER

    @property
    def has_time(self) -> bool:
        """Whether another look fits."""
        return self.spent + self.expected <= SHARE * self.budget and self.expected <= self.spare()

    @property
    def expected(self) -> float:
        """Seconds of one more look."""
        if self.looks:
            return self.spent / self.looks
        return ONE_LOOK if self.rehearsed is None else self.rehearsed.seconds

    @property
    def first_look(self) -> float:
        """Seconds that a trial takes to look at its network."""
        return ONE_LOOK if self.rehearsed is None else self.rehearsed.first_look

    def rehearse(self) -> None:
        """Look at what the default costs before anything is searched: how long that takes, the study plans with.

        What is found is remembered for trial 0. A default that can't be measured is not the end: it is looked at again.
        """
        default = untrained(self.recipe, self.recipe.experiment())
        try:
            self.rehearsed = costs_of(self.recipe, default, self.folder, quiet=True, trained=False)
        except MedrayError as error:
            self.tell(f"the default could not be measured: {error}")

    def look(self, candidate: Candidate, *, afresh: bool = False) -> Costs:
        """What a candidate costs.

        Args:
            candidate: what to export and run.
            afresh: with these weights, whatever is remembered of the architecture.
        """
        began = time.monotonic()
        if afresh:
            self.tell(f"measuring what {candidate.name} costs to run")
        found = costs_of(self.recipe, candidate, self.folder, quiet=True, afresh=afresh)
        if time.monotonic() - began > LOOKED:  # what is remembered says nothing of the next one
            self.spent += time.monotonic() - began
            self.looks += 1
        return found


def pick_trial(
    records: Sequence[TrialRecord], chooser: Chooser, objective: str, quiet: Quiet
) -> tuple[TrialRecord | None, bool]:
    """The completed trial whose experiment is worth a final fit, and whether it keeps the limits on costs.

    The one that the rule puts first is looked at quietly, and ranked again with what was found, until the first has
    been looked at: a trial that was measured while others trained gets its due, and one that only seemed to keep a
    limit falls back. Until then latencies count as if the other programs' share of the CPU had been theirs.

    None where every trial is refused, but the default has not been judged. The limit on accuracy is left for the
    finalists.

    Raises:
        StudyError: every trial is refused, the default too: a final fit would be for nothing.
    """
    rule = chooser.for_search()
    completed = {record.number: record for record in records if record.values is not None}
    found: dict[int, dict[str, Interval]] = {
        number: figures_of(record, objective) | _hopeful(record) for number, record in completed.items()
    }
    measured, kept_one = bool(rule.needs & set(MEASURED)), False
    looked: set[int] = set()
    while completed:
        options = [Option(name=f"trial {n}", figures=figures, tie=-n) for n, figures in found.items()]
        ranked = rule.rank(options, reference=list(found.values()))
        first = ranked[0]
        number = int(first.option.name.removeprefix("trial "))
        unmeasured = [n for n in found if n not in looked and rule.needs & set(MEASURED) - found[n].keys()]
        if first.refused and unmeasured and (quiet.has_time or not looked):
            # Of a study that was begun without this limit: look before anything is refused.
            order = [one.option.name for one in rule.without_limits().rank(options)]
            number = min(unmeasured, key=lambda n: order.index(f"trial {n}"))
        elif first.refused and 0 in completed:
            raise StudyError(_nobody(ranked[:5], {}, quiet.recipe.directory))
        elif first.refused:
            return None, False
        record = completed[number]
        settled = not measured or number in looked or _is_clear(record, rule) or (kept_one and not quiet.has_time)
        if settled and number not in unmeasured:
            return record, not first.broken
        trained = load_trained(quiet.recipe, Path(record.directory))
        params = {} if record.is_default else record.params
        candidate = (
            Candidate(name=f"trial {number}", members=(trained,))
            if trained is not None
            else untrained(quiet.recipe, quiet.recipe.experiment(params))
        )
        looked.add(number)
        try:
            found[number] |= quiet.look(candidate).figures
        except MedrayError as error:
            quiet.tell(f"{candidate.name}: {error}")
            found[number] = {name: figure for name, figure in found[number].items() if name not in MEASURED}
        kept_one = kept_one or not any(not verdict.kept for verdict in rule.judge(found[number]))
    return None, False


def _is_clear(record: TrialRecord, rule: Chooser) -> bool:
    """Whether a trial was measured undisturbed, and keeps each limit with a tenth to spare."""
    undisturbed = float(record.extras.get("others", 1.0)) <= UNDISTURBED
    return undisturbed and all(excess < -0.1 for excess in rule.constraints(record.metrics).values())


def _hopeful(record: TrialRecord) -> dict[str, Interval]:
    """Latencies of a trial as they may turn out when nobody else takes the CPU."""
    others = float(record.extras.get("others", 0.0))
    names = [name for name in ("latency_ms", "latency_p95_ms") if name in record.metrics and others > UNDISTURBED]
    return {name: exact(record.metrics[name] * (1.0 - others)) for name in names}


@dataclass(frozen=True, kw_only=True)
class Crowning:
    """Who is champion, and why.

    Attributes:
        ranked: all candidates, best first.
        costs: of those that were measured.
        reasons: why others were not.
        why: in a sentence or two.
    """

    ranked: tuple[Ranked, ...]
    costs: Mapping[str, Costs]
    reasons: Mapping[str, str]
    why: str

    @property
    def winner(self) -> str:
        """The champion's name."""
        return self.ranked[0].option.name


def crown(
    candidates: Sequence[Candidate],
    scores: Mapping[str, Scores],
    chooser: Chooser,
    objective: str,
    records: Sequence[TrialRecord],
    quiet: Quiet,
) -> Crowning:
    """Choose the champion on validation cases and quietly measured costs.

    The winner is measured with its own weights before it is crowned; where it then breaks a limit, the next one is.

    Raises:
        StudyError: every candidate breaks a limit, and those that do are refused.
    """
    costs: dict[str, Costs] = {}
    reasons: dict[str, str] = {}
    fixed = {c.name: _figures(c, scores[c.name], chooser, objective) for c in candidates}
    by_name = {candidate.name: candidate for candidate in candidates}
    completed = [figures_of(record, objective) for record in records if record.values is not None]
    measured = bool(chooser.needs & set(MEASURED))

    def options() -> list[Option]:
        return [
            Option(
                name=name,
                figures=figures | (costs[name].figures if name in costs else {}),
                tie=scores[name].tie,
            )
            for name, figures in fixed.items()
        ]

    def rank() -> list[Ranked]:
        return chooser.rank(options(), reference=completed)

    def look(name: str, *, afresh: bool) -> None:
        try:
            costs[name] = quiet.look(by_name[name], afresh=afresh)
        except MedrayError as error:
            costs.pop(name, None)
            reasons[name] = str(error)

    if measured and chooser.rule == "best":  # of those that keep the limits the best is wanted: the others cost nothing
        order = [found.option.name for found in chooser.without_limits().rank(options())]
        for name in order:
            if len(by_name[name].members) > 1 and not quiet.has_time:
                reasons[name] = "not measured: its time was over"
                continue
            if any(found.option.name in costs and not found.broken for found in rank()):
                reasons[name] = "not measured: a better one is chosen"
                continue
            look(name, afresh=True)
        measured = False
    elif measured:
        for candidate in sorted(candidates, key=lambda c: len(c.members)):
            if len(candidate.members) == 1 or quiet.has_time or rank()[0].refused:
                look(candidate.name, afresh=False)
            else:
                reasons[candidate.name] = "not measured: its time was over"
    ranked, verified = rank(), set[str]()
    while measured and not ranked[0].refused and (name := ranked[0].option.name) not in verified:
        verified.add(name)
        look(name, afresh=True)
        ranked = rank()
    if ranked[0].refused:
        for name, cost in costs.items():
            if cost.others > UNDISTURBED:
                reasons.setdefault(name, f"other programs took {cost.others:.0%} of the CPU meanwhile")
        raise StudyError(_nobody(ranked, reasons, quiet.recipe.directory))
    return Crowning(
        ranked=tuple(ranked), costs=costs, reasons=reasons, why=explain(chooser, ranked, objective.removeprefix("val/"))
    )


def _figures(candidate: Candidate, scores: Scores, chooser: Chooser, objective: str) -> dict[str, Interval]:
    """What a candidate came to, but for what has to be measured on the exported model."""
    fits = [member.fit for member in candidate.members if isinstance(member, Trained)]
    figures = {
        ACCURACY: scores.interval(),
        "parameters": exact(sum(p.numel() for member in candidate.members for p in member.model.parameters())),
        "seconds": exact(sum(fit.seconds for fit in fits)) if fits else exact(float("nan")),
        "peak_memory_mb": exact(max(fit.peak_memory_mb for fit in fits)) if fits else exact(float("nan")),
    }
    for name in chooser.needs - set(figures) - set(MEASURED):
        metric = name.removeprefix("val/")
        if f"val/{metric}" != objective:
            figures[name] = bootstrap(scores.arrays, partial(scores.task.measure, metric), groups=scores.groups, n=500)
    return figures


def _nobody(ranked: Sequence[Ranked], reasons: Mapping[str, str], directory: str) -> str:
    lines = []
    for found in ranked:
        name = found.option.name
        broken = "; ".join(
            f"{v.name} {found.option.figures[v.name].value:.4g} (95 % CI to {_end(found.option.figures[v.name]):.4g}), "
            f"limit {v.limit:g}"
            if v.name in found.option.figures
            else f"{v.name} was not measured, limit {v.limit:g}"
            for v in found.broken
        )
        lines.append(f"  {name}: {broken}" + (f" ({reasons[name]})" if name in reasons else ""))
    return "\n".join(
        [
            "nothing keeps the limits of study.select, so there is no champion. The nearest:",
            *lines,
            f"Everything that was trained is kept. Resume with a looser limit and more trials (medray tune --resume "
            f"{directory} study.select.limits.NAME=VALUE study.trials=N study.budget=TIME), or let the one that "
            "breaks them least win "
            "(study.select.on_fail=last)",
        ]
    )


def _end(found: Interval) -> float:
    return found.value if np.isnan(found.high) else found.high
