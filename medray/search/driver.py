"""The study itself: asks Optuna for trials, takes their reports and ends, and remembers all of it in one SQLite file.

Knows no engine: whoever runs trials calls :meth:`StudyDriver.ask`, then ``report`` while a trial runs, then one of
``complete``, ``prune``, ``fail``. A trial that none of them ended (the process was killed) comes again from ``ask`` of
the next process, with its number, parameters and folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from medray.config.schema import StudyConfig
from medray.errors import StudyError
from medray.search import pareto
from medray.search.importance import Importance, measure_importance
from medray.search.limits import COSTS, Limits, costs_of
from medray.search.past import Proposal
from medray.search.pruning import RULES, Curve, replanned
from medray.search.samplers import (
    OUTSIDE,
    ReseededSampler,
    SamplerName,
    build_sampler,
    choose_sampler,
    derive_seed,
)
from medray.search.space import Space
from medray.search.storage import MemoryFile, StudyFile
from medray.search.trial import Direction, TrialOutcome, TrialRecord, TrialTask
from medray.search.trial import TrialState as State

_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_FIRST_FAILURES = 3  # that end a study in which nothing has worked yet
_ERROR_CHARACTERS = 20_000
_MORE = 2  # trials that may come for each planned one, where others are refused before they are trained
_ROUNDING = 0.01  # by which a schedule that is laid by the clock may overshoot its end
_STEPS = 1000
"""Optuna's intermediate values stand at thousandths of the schedule, so that trials of all lengths compare."""


class StudyDriver:
    """A search over a space, stored in ``<directory>/study.db``; opening the folder again resumes it.

    Args:
        space: what varies.
        config: sampler, pruner, number of trials, seed, limits. An opened study may have other limits than it began
            with: by how much its trials break them is derived anew from what they were measured to cost.
        objectives: metric → ``max`` or ``min``; the first is the one that a single number is shown of.
        directory: the study's folder; trials lie in ``trials/<number>``.
        default_params: the default Experiment's values at the space's paths (others are ignored).
        proposals: of the space, tried right after the default; an opened study keeps those that it began with.
        file: where it is stored instead.

    Raises:
        StudyError: the folder holds another study (space, objectives, seed), is in use, or the sampler doesn't fit.
    """

    def __init__(
        self,
        space: Space,
        config: StudyConfig,
        objectives: Mapping[str, Direction],
        directory: Path,
        default_params: Mapping[str, Any],
        proposals: Sequence[Proposal] = (),
        file: StudyFile | MemoryFile | None = None,
    ) -> None:
        if not objectives:
            raise StudyError("a study needs at least one objective; set study.objectives, such as {val/dice: max}")
        if not len(space):
            raise StudyError("the search space is empty; name at least one parameter under 'space'")
        self.space, self.config, self.directory = space, config, Path(directory)
        self.objectives = dict(objectives)
        self.default_params = space.active(default_params)
        self.default_in_space = space.contains(self.default_params)
        self._rule = RULES[config.pruner]
        self._proposals = [asdict(proposal) for proposal in proposals if space.contains(proposal.params)]
        self._file = StudyFile(self.directory) if file is None else file
        self._limits = Limits(config.select, self._file)
        try:
            self._study = self._open_study()
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> StudyDriver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write everything into study.db and release the folder."""
        self._keep_time(force=True)
        self._file.close()

    # Opening ---------------------------------------------------------------------------------------------------------

    def _open_study(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = self._file.storage
        names = optuna.get_all_study_names(storage)
        if names:
            self._limits.renew(names[0])
        study = optuna.create_study(
            study_name=names[0] if names else self.config.name,
            storage=storage,
            sampler=ReseededSampler(self._make_sampler, self.config.seed),
            pruner=optuna.pruners.NopPruner(),
            directions=["maximize" if direction == "max" else "minimize" for direction in self.objectives.values()],
            load_if_exists=True,
        )
        stored = study.user_attrs.get("setup")
        asked = {
            "space": self.space.describe(),
            "objectives": self.objectives,
            "seed": self.config.seed,
            # "auto" is decided once: more trials on resuming must not change the sampler under way.
            "sampler": stored["sampler"] if stored and self.config.sampler == "auto" else self._choose_sampler(),
            "trials": self.config.trials,
        }
        asked = json.loads(json.dumps(asked))  # as it is stored: JSON turns tuples into lists
        if stored is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(self.objectives))
            study.set_user_attr("proposals", self._proposals)
            study.set_user_attr("setup", asked)
            stored = asked
        self._check_setup(stored, asked)
        self.sampler_name: SamplerName = stored["sampler"]
        self._planned = int(stored["trials"])
        self._proposals = list(study.user_attrs.get("proposals", ()))
        return study

    def _choose_sampler(self) -> SamplerName:
        return choose_sampler(
            self.config.sampler, self.space, objectives=len(self.objectives), trials=self.config.trials
        )

    def _make_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        # Sized for the trials that the study began with: raising study.trials later must not change what is drawn.
        return build_sampler(self.sampler_name, seed=seed, trials=self._planned)

    def _check_setup(self, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        named = {"space": "space", "objectives": "study.objectives", "seed": "study.seed", "sampler": "study.sampler"}
        for part, name in named.items():
            if stored[part] != asked[part]:
                raise StudyError(
                    f"{self.directory} holds a study with another {name}:\n  stored: {stored[part]}\n"
                    f"  asked:  {asked[part]}\nGive the stored one to resume it, or begin anew with another study.name"
                )

    def _load(self) -> None:
        self._ids: dict[int, int] = {}
        self._params: dict[int, dict[str, Any]] = {}
        self._histories: dict[int, list[dict[str, Any]]] = {}
        self._reported: set[str] = set()
        self._drawn: dict[int, tuple[list[dict[str, Any]], tuple[tuple[str, ...], bool], Curve]] = {}
        self._lost_on: dict[int, list[str]] = {}
        self._costs: dict[int, dict[str, float]] = {}
        self._broken: dict[int, dict[str, float]] = {}
        self._refused = 0
        self._running: set[int] = set()
        self._unfinished: list[int] = []
        self._failures: list[tuple[int, str]] = []
        self._successes = 0
        self.fatal: str | None = None
        """Why the study must stop, once it must: the default trial, or each of the first trials, has failed."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == TrialState.WAITING:
                continue  # queued by a process that died before it began: ask() takes it up
            self._ids[trial.number] = trial._trial_id
            self._params[trial.number] = dict(trial.user_attrs.get("params", {}))
            self._histories[trial.number] = list(trial.user_attrs.get("history", []))
            self._reported |= {name for row in self._histories[trial.number] for name in row["metrics"]}
            self._lost_on[trial.number] = list(trial.user_attrs.get("losses", []))
            self._costs[trial.number] = costs_of(trial)
            self._broken[trial.number] = dict(trial.constraints)
            self._refused += trial.user_attrs.get("stopped") == "refused" and trial.state == TrialState.PRUNED
            if trial.state == TrialState.RUNNING:
                self._unfinished.append(trial.number)
            elif trial.state == TrialState.FAIL:
                self._failures.append((trial.number, str(trial.user_attrs.get("error", ""))))
            else:
                self._successes += 1
        self._earlier_seconds = float(self._study.user_attrs.get("seconds", 0.0))
        self._opened = time.monotonic()
        self._kept = self._opened

    # Asking ----------------------------------------------------------------------------------------------------------

    @property
    def spent(self) -> float:
        """Seconds that processes have held this study open, those that were killed included (to a few seconds)."""
        return self._earlier_seconds + time.monotonic() - self._opened

    @property
    def proposals(self) -> list[Proposal]:
        """What the trials right after the default are, as earlier studies found it."""
        return [Proposal(**proposal) for proposal in self._proposals]

    @property
    def running(self) -> frozenset[int]:
        """Trials that were asked for in this process and have not ended."""
        return frozenset(self._running)

    @property
    def has_next(self) -> bool:
        """Whether ask() would give a trial."""
        wanted = self.config.trials + min(self._refused, _MORE * self.config.trials)
        return self.fatal is None and (bool(self._unfinished) or len(self._ids) < wanted)

    @property
    def next_share(self) -> float:
        """Share of a trial's schedule that the next one has yet to run: below 1 for one taken up again."""
        history = self._histories[self._unfinished[0]] if self._unfinished else []
        return 1.0 - history[-1]["fraction"] if history else 1.0

    def ask(self, *, seconds: float | None = None, deadline: float | None = None) -> TrialTask | None:
        """The next trial: one that an earlier process left unfinished, else a new one; None when there is none left.

        Args:
            seconds: what the trial may train for.
            deadline: epoch seconds at which the search ends.
        """
        if not self.has_next:
            return None
        number = self._unfinished.pop(0) if self._unfinished else self._create()
        params = self._prepare(number)
        self._running.add(number)
        self._keep_time()
        directory = self.trial_directory(number)
        directory.mkdir(parents=True, exist_ok=True)
        return TrialTask(
            number=number,
            params=params,
            directory=directory,
            seed=derive_seed(self.config.seed, number, 2),
            is_default=number == 0,
            seconds=seconds,
            deadline=deadline,
        )

    def trial_directory(self, number: int) -> Path:
        """Where a trial writes."""
        return self.directory / "trials" / f"{number:04d}"

    def _create(self) -> int:
        number = len(self._ids)
        if not self._study.get_trials(states=(TrialState.WAITING,)):
            if number == 0 and self.default_in_space:
                self._study.enqueue_trial(self.space.encode(self.default_params))
            elif 1 <= number <= len(self._proposals):
                self._study.enqueue_trial(self.space.encode(self._proposals[number - 1]["params"]))
        trial = self._study.ask()
        self._ids[trial.number] = trial._trial_id
        self._histories[trial.number] = []
        return trial.number

    def _prepare(self, number: int) -> dict[str, Any]:
        """Give a trial its parameters, unless it has them. Repeated after a kill anywhere within, it gives the same."""
        if stored := self._params.get(number):
            return stored
        if number == 0 and not self.default_in_space:
            params = self.default_params
            self._set(number, OUTSIDE, True)
        else:
            # Optuna's handle on a stored trial. The sampler is seeded by its number: a half-drawn one is drawn alike.
            params = self.space.suggest(optuna.Trial(self._study, self._ids[number]))
        if number == 0:
            self._set(number, "default", True)
        self._set(number, "params", params)
        self._params[number] = dict(params)
        return self._params[number]

    # Telling ---------------------------------------------------------------------------------------------------------

    def report(
        self,
        number: int,
        step: int,
        fraction: float,
        metrics: Mapping[str, float],
        *,
        costs: Mapping[str, float] | None = None,
        **more: Any,
    ) -> bool:
        """Take a report of a running trial.

        Args:
            number: the trial.
            step: its optimiser steps so far, 0 or more.
            fraction: share of its schedule that is done, 0..1.
            metrics: of this validation.
            costs: for :meth:`weigh`, as far as they are known.
            more: kept in the history (epoch, seconds, measuring).

        Returns:
            whether the trial should be stopped: the caller then ends it with :meth:`prune`.
        """
        self._must_run(number)
        if not 0.0 <= fraction <= 1.0 + _ROUNDING:
            raise StudyError(f"trial {number} reported fraction={fraction!r}; it must lie within 0..1")
        fraction = min(fraction, 1.0)
        self.weigh(number, costs or {})
        before = self._histories[number]
        history = replanned(before, step, fraction)
        if _places(history) != _places(before):
            self._file.replace_intermediate_values(self._ids[number], self._intermediate(history))
        history.append({**more, "step": int(step), "fraction": float(fraction), "metrics": _floats(metrics)})
        self._histories[number] = history
        self._reported |= history[-1]["metrics"].keys()
        self._set(number, "history", history)
        for place, value in self._intermediate(history[-1:]).items():
            self._file.storage.set_trial_intermediate_value(self._ids[number], place, value)
        self._keep_time()
        if number == 0:
            return False
        curves = self._curves()
        ended = self._ids.keys() - self._running - set(self._unfinished)
        return bool(curves.get(number)) and self._rule(curves, number, ended)

    def weigh(self, number: int, costs: Mapping[str, float]) -> None:
        """Keep what a running trial costs to run, by figure; samplers and rungs heed by how much it breaks a limit.

        TPE counts a trial that breaks one as worse than all that keep them, by how much it does; NSGA-II dominates by
        feasibility first; at a rung it stands behind all that keep them.
        """
        self._must_run(number)
        before = self._costs.setdefault(number, {})
        found = before | {name: value for name, value in _floats(costs).items() if math.isfinite(value)}
        if found != before:
            self._costs[number] = found
            self._set(number, COSTS, found)
            self._broken[number] = self._limits.broken(found)
            self._limits.set(self._ids[number], self._broken[number])

    def lose(self, number: int, host: str) -> None:
        """Keep that a running trial was lost with its process on ``host``, and is run again."""
        self._must_run(number)
        self._lost_on.setdefault(number, []).append(host)
        self._set(number, "losses", self._lost_on[number])

    def complete(self, number: int, outcome: TrialOutcome) -> None:
        """End a trial with its outcome.

        One cut off by the deadline counts as pruned, one without finite objectives as failed.
        """
        self._must_run(number)
        values = [outcome.metrics.get(name) for name in self.objectives]
        self._set(number, "metrics", _floats(outcome.metrics))
        self._set(number, "seconds", float(outcome.seconds))
        self._set(number, "extras", dict(outcome.extras))
        self._set(number, "measuring", float(outcome.measuring))
        self.weigh(number, outcome.costs)
        if outcome.stopped in ("deadline", "pruned", "refused"):
            self._refused += outcome.stopped == "refused"
            self.prune(number, outcome.stopped)
            return
        bad = {
            name: value
            for name, value in zip(self.objectives, values, strict=True)
            if value is None or not math.isfinite(value)
        }
        if bad:
            self.fail(
                number,
                f"the trial ended without a finite value for its objectives: {bad}; it gave {dict(outcome.metrics)}",
            )
            return
        self._set(number, "stopped", outcome.stopped)
        self._end(number, TrialState.COMPLETE, [float(value) for value in values if value is not None])
        self._successes += 1

    def prune(self, number: int, reason: str = "pruned") -> None:
        """End a trial early: PRUNED to Optuna, with the values that it has reported."""
        self._must_run(number)
        self._set(number, "stopped", reason)
        self._end(number, TrialState.PRUNED)
        self._successes += 1

    def fail(self, number: int, error: str) -> None:
        """End a trial that failed; the study goes on unless :attr:`fatal` says otherwise.

        Args:
            error: the worker's own traceback, or why it died; also written to ``error.txt`` in the trial's folder.
        """
        self._must_run(number)
        directory = self.trial_directory(number)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "error.txt").write_text(error, encoding="utf-8")
        self._set(number, "error", error[-_ERROR_CHARACTERS:])
        self._failures.append((number, error))
        if number == 0:
            # Left unended, so that a resumed study begins with it again: without it no gain could be stated.
            self._running.discard(number)
            self.fatal = f"the default trial failed, so the study has nothing to compare with:\n{error}"
            return
        self._end(number, TrialState.FAIL)
        if len(self._failures) >= _FIRST_FAILURES and not self._successes:
            numbers = ", ".join(str(failed) for failed, _ in self._failures)
            self.fatal = f"the first {len(self._failures)} trials all failed ({numbers}); the last one:\n{error}"

    def _end(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        self._set(number, "ended", self.spent)
        self._study.tell(number, values, state=state)
        self._running.discard(number)
        self._keep_time(force=True)
        self._file.sync()

    def _must_run(self, number: int) -> None:
        if number not in self._running:
            raise StudyError(f"trial {number} is not running; ask() gives trials out, and each ends once")

    def _set(self, number: int, key: str, value: Any) -> None:
        self._file.storage.set_trial_user_attr(self._ids[number], key, value)

    def _keep_time(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._kept > 5.0:
            self._study.set_user_attr("seconds", self.spent)
            self._kept = now

    def _curves(self) -> dict[int, Curve]:
        """All trials' reports as losses, over the objectives that the trials report while they run.

        A trial that breaks a limit stands behind all that keep them (Deb's constrained domination).
        """
        names = tuple(name for name in self.objectives if name in self._reported)
        if not names:
            return {}
        curves: dict[int, Curve] = {}
        for number, history in self._histories.items():
            behind = any(value > 0 for value in self._broken.get(number, {}).values())
            known = self._drawn.get(number)
            # A history is never changed, but replaced: most trials' are what they were at the last report.
            if known is None or known[0] is not history or known[1] != (names, behind):
                curve = [
                    (entry["fraction"], (math.inf,) * len(names) if behind else self._losses(entry["metrics"], names))
                    for entry in history
                ]
                known = self._drawn[number] = (history, (names, behind), curve)
            if known[2]:
                curves[number] = known[2]
        return curves

    def _intermediate(self, history: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        """Reports as Optuna keeps them, of single-objective studies only; the history has those of all."""
        first, *others = self.objectives
        given = zip(_places(history), (entry["metrics"].get(first, math.nan) for entry in history), strict=True)
        return {} if others else {place: value for place, value in given if math.isfinite(value)}

    def _losses(self, metrics: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
        signed = ((metrics.get(name, math.nan), -1.0 if self.objectives[name] == "max" else 1.0) for name in names)
        return tuple(math.inf if math.isnan(value) else sign * value for value, sign in signed)

    # Looking ---------------------------------------------------------------------------------------------------------

    def records(self) -> list[TrialRecord]:
        """All trials, by number."""
        return [
            self._record(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING
        ]

    def record(self, number: int) -> TrialRecord:
        """One trial that has been asked for."""
        return self._record(self._file.storage.get_trial(self._ids[number]))

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        attrs = trial.user_attrs
        history = tuple(attrs.get("history", ()))
        state = _STATES[trial.state]
        if state == "running" and trial.number == 0 and self.fatal is not None:
            state = "failed"
        proposed = 1 <= trial.number <= len(self._proposals)
        return TrialRecord(
            number=trial.number,
            state=state,
            params=dict(attrs.get("params", {})),
            is_default=trial.number == 0,
            in_space=OUTSIDE not in attrs,
            metrics=dict(attrs.get("metrics") or (history[-1]["metrics"] if history else {})),
            values=tuple(trial.values) if trial.state == TrialState.COMPLETE else None,
            fraction=1.0 if state == "completed" else float(history[-1]["fraction"]) if history else 0.0,
            seconds=float(attrs.get("seconds", history[-1].get("seconds", 0.0) if history else 0.0)),
            stopped=str(attrs.get("stopped", "")),
            history=history,
            extras=dict(attrs.get("extras", {})),
            measuring=float(attrs.get("measuring", max((row.get("measuring", 0.0) for row in history), default=0.0))),
            losses=tuple(attrs.get("losses", ())),
            constraints=dict(trial.constraints),
            ended=attrs.get("ended"),
            error=attrs.get("error") if state == "failed" else None,
            directory=self.trial_directory(trial.number),
            proposal=Proposal(**self._proposals[trial.number - 1]) if proposed else None,
        )

    def counts(self) -> dict[State, int]:
        """Number of trials in each state."""
        tally: dict[State, int] = {"running": 0, "completed": 0, "pruned": 0, "failed": 0}
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state != TrialState.WAITING:
                tally[_STATES[trial.state]] += 1
        return tally

    def default(self) -> TrialRecord | None:
        """Trial 0, if it has begun."""
        return next((record for record in self.records() if record.number == 0), None)

    def front(self) -> list[TrialRecord]:
        """Completed trials that no other dominates, best first; with one objective, the best alone.

        Of those that keep every limit, where any does.
        """
        completed = [record for record in self.records() if record.values is not None]
        completed = [record for record in completed if record.feasible] or completed
        if not completed:
            return []
        points = self._points(completed)
        chosen = pareto.front(points)
        if len(self.objectives) == 1:
            chosen = chosen[:1]  # ties: the earlier trial
        return [completed[index] for index in sorted(chosen, key=lambda index: tuple(points[index]))]

    def best(self) -> TrialRecord | None:
        """The best completed trial, if any; with several objectives the front's member nearest to the ideal."""
        members = self.front()
        return members[pareto.knee(self._points(members))] if members else None

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Volume that the completed trials dominate up to ``reference``, given as objective values in their order."""
        completed = [record for record in self.records() if record.values is not None]
        limit = pareto.losses([reference], list(self.objectives.values()))[0]
        return pareto.hypervolume(self._points(completed), limit.tolist())

    def table(self) -> list[TrialRecord]:
        """The leaderboard: completed trials best first, then pruned, running, failed.

        Completed ones are ordered by whether they keep the limits, by front, then by the first objective; pruned ones
        by how far they came.
        """
        records = self.records()
        completed = [record for record in records if record.values is not None]
        points = self._points(completed)
        ranks = pareto.non_dominated_rank(points)
        order = {
            record.number: (not record.feasible, int(ranks[i]), *points[i].tolist())
            for i, record in enumerate(completed)
        }
        last = {"completed": 0, "pruned": 1, "running": 2, "failed": 3}

        def key(record: TrialRecord) -> tuple[Any, ...]:
            return (last[record.state], order.get(record.number, ()), -record.fraction, record.number)

        return sorted(records, key=key)

    def importance(self) -> Importance:
        """How much each parameter mattered to the first objective; empty, with a reason, for too few trials."""
        in_space = [t for t in self._study.get_trials(deepcopy=False) if OUTSIDE not in t.user_attrs]
        name, direction = next(iter(self.objectives.items()))
        return measure_importance(in_space, self._histories, objective=name, direction=direction, seed=self.config.seed)

    def _points(self, records: Sequence[TrialRecord]) -> pareto.Floats:
        return pareto.losses([record.values or () for record in records], list(self.objectives.values()))


def _places(history: Sequence[Mapping[str, Any]]) -> list[int]:
    return [round(_STEPS * entry["fraction"]) for entry in history]


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics, as plain floats (no NumPy scalars): JSON takes them."""
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        with contextlib.suppress(TypeError, ValueError):
            kept[str(name)] = float(value)
    return kept
