"""The contest for the champion: finalists, and all that can be made of them, judged on validation cases alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from medray.config.schema import StudyConfig
from medray.data.splits import Splits
from medray.errors import MedrayError
from medray.learn.corrupt import CORRUPTIONS
from medray.search.nas.loop import Found
from medray.search.selection import Chooser
from medray.search.trial import TrialRecord
from medray.tasks.catalogue import TaskKind, find_task
from medray.tasks.task import Direction
from medray.workflows import champion as choosing
from medray.workflows.champion import Answers, Candidate, Scores
from medray.workflows.clock import Clock
from medray.workflows.ensembles import MOST, further, greedy_soup
from medray.workflows.judging import spread
from medray.workflows.predictions import NAME as PREDICTIONS
from medray.workflows.recipe import Recipe
from medray.workflows.selecting import Crowning, Quiet, crown
from medray.workflows.training import Trained, load_trained

LIBRARY = 6
"""Trials, at most, whose own networks an ensemble may take: the best of those that ended."""


def robustness_extent(budget: float, kind: TaskKind, case_seconds: float) -> tuple[tuple[int, ...], int]:
    """Severities and cases of the robustness section: as many as a twentieth of the study's budget allows, but a few.

    Args:
        budget: seconds of the study.
        kind: of the task.
        case_seconds: of scoring the champion on one case.
    """
    allowed = max(3.0, budget / 20)
    levels = (1, 2, 3) if 4 * case_seconds * (3 * len(CORRUPTIONS) + 1) <= allowed else (2,)
    affordable = int(allowed / max(case_seconds, 1e-4) / (len(levels) * len(CORRUPTIONS) + 1))
    few, many = (4, 16) if find_task(kind).dense else (30, 200)
    return levels, min(many, max(few, affordable))


def robustness_seconds(budget: float, kind: TaskKind, case_seconds: float) -> float:
    """What of a study's budget is kept for the robustness section; arguments as above."""
    levels, cases = robustness_extent(budget, kind, case_seconds)
    return max(3.0, budget / 20, cases * (len(levels) * len(CORRUPTIONS) + 1) * case_seconds)


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What the last stage is made from.

    Attributes:
        chooser: the study's rule.
        quiet: looks at what candidates cost.
        slots: trials that ran at once.
        found: by an architecture search.
    """

    directory: Path
    recipe: Recipe
    study: StudyConfig
    source: str
    command: str
    objective: tuple[str, Direction]
    finalists: tuple[tuple[str, Trained], ...]
    records: tuple[TrialRecord, ...]
    importance: Mapping[str, float]
    sampler: str
    clock: Clock
    chooser: Chooser
    quiet: Quiet
    slots: int = 1
    found: Found | None = None


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Who stood, and how each did on the validation cases.

    Attributes:
        candidates: trial 0's experiment first.
        single: the best of the networks that were trained, none of them combined.
        answers: what the networks said, and how long that took.
        crowning: how it was chosen where more than the metric counts.
    """

    candidates: tuple[Candidate, ...]
    scores: Mapping[str, Scores]
    winner: str
    single: str
    answers: Answers
    crowning: Crowning | None = None

    def named(self, name: str) -> Candidate:
        """A candidate."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def latency_ms(self, candidate: Candidate) -> float:
        """Of one case, all its networks one after another, without reading and preparing; NaN where one never ran."""
        return 1000 * sum(self.answers.seconds(member) for member in candidate.members)


def hold_contest(asked: Conclusion, splits: Splits, metric: str) -> Contest:
    """Judge all candidates, and choose one.

    Args:
        asked: what the last stage is made from.
        splits: of the study; the test cases are not looked at.
        metric: the objective without its ``val/``.
    """
    recipe, direction, answers = asked.recipe, asked.objective[1], Answers()
    candidates = choosing.candidates_of(recipe, asked.finalists, ensemble=asked.study.ensemble)
    began = time.monotonic()
    scores = choosing.score(recipe, candidates, splits.val, metric=metric, known=answers)
    case_seconds = (time.monotonic() - began) / len(splits.val) / len(asked.finalists)
    robustness = robustness_seconds(asked.study.budget, recipe.manifest.task, case_seconds)
    follows = 22.0 + robustness + 3 * case_seconds * len(splits.test or splits.val)
    if asked.study.ensemble:

        def spare(cases: float) -> bool:
            """Whether so many more cases of one network fit beside what has to follow."""
            return asked.clock.left > follows + 1.2 * case_seconds * cases

        library = _library(asked) if spare(MOST * len(splits.test)) else []
        more, found = further(recipe, asked.finalists, scores, answers, direction=direction, library=library)
        candidates, scores = candidates + more, scores | found
        soup = greedy_soup(
            recipe, asked.finalists, scores, direction=direction, spare=lambda: spare(len(splits.val)), known=answers
        )
        if soup is not None:
            candidates, scores = [*candidates, soup[0]], scores | {soup[0].name: soup[1]}
    crowning = None
    if asked.chooser.is_plain:
        winner = choosing.choose(scores, candidates[0].name, direction)
    else:
        quiet = replace(asked.quiet, spare=lambda: asked.clock.left - follows)
        crowning = crown(candidates, scores, asked.chooser, asked.objective[0], asked.records, quiet)
        winner = crowning.winner
    singles = {name: scores[name] for name, _ in asked.finalists}
    contest = Contest(
        candidates=tuple(candidates),
        scores=scores,
        winner=winner,
        single=choosing.choose(singles, candidates[0].name, direction),
        answers=answers,
        crowning=crowning,
    )
    for candidate in candidates:  # trials' networks, whose predictions were kept, have not run here yet
        if math.isnan(contest.latency_ms(candidate)):
            choosing.score(recipe, [candidate], spread(splits.val, 3), metric=metric, known=_Timer(answers))
    return contest


class _Timer(Answers):
    """Has networks run though their answers are known, for the time that they take."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(limit=0)
        self._seconds = answers._seconds


def _library(asked: Conclusion) -> list[tuple[str, Trained]]:
    """The best trials that ended and kept their predictions, but for those that are finalists as they are."""
    name, direction = asked.objective
    sign = 1.0 if direction == "max" else -1.0
    ended = [record for record in asked.records if record.state == "completed" and name in record.metrics]
    ended = [record for record in ended if (Path(record.directory) / PREDICTIONS).is_file()]
    finalists = {trained.directory for _, trained in asked.finalists}
    ended = [record for record in ended if Path(record.directory) not in finalists]
    found: list[tuple[str, Trained]] = []
    for record in sorted(ended, key=lambda record: -sign * record.metrics[name])[:LIBRARY]:
        with suppress(MedrayError, OSError, ValueError, KeyError, TypeError):  # a damaged folder is not worth a study
            trained = load_trained(asked.recipe, Path(record.directory))
            if trained is not None:
                found.append((f"trial-{record.number}", trained))
    return found
