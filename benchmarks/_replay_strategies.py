"""Strategies that search a recorded table, and the simulator that runs them against a virtual clock.

Ours is :class:`medray.search.driver.StudyDriver` itself. The others are Optuna's samplers, Ray Tune's own OptunaSearch
and ASHA, and Optuna's Hyperband with its TPE, which is BOHB but for the density estimator. All begin with the plan's
default, and see the grid as the ranges that it lies in.
"""

from __future__ import annotations

import heapq
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from benchmarks._replay_tables import LOGARITHMIC, VALIDATIONS, Curve, Table

TRIALS = 200
"""Planned, by those who plan."""
SLOTS = 4
"""Trials at once."""


class Strategy(Protocol):
    """What the simulator asks and tells."""

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        """Number and parameters of the next trial; None for no more."""

    def report(self, number: int, step: int, value: float) -> bool:
        """A validation, from 1; True stops the trial."""

    def end(self, number: int, values: tuple[float, ...], *, seconds: float, stopped: bool) -> None:
        """The trial is over: all its values, and its seconds."""

    def close(self) -> None:
        """No more is asked."""


Make = Callable[[Table, int], Strategy]
"""From a table and a seed."""


def simulate(strategy: Strategy, table: Table, goal: float, *, slots: int = SLOTS) -> float:
    """Virtual seconds until a validation reaches ``goal``; the time of the whole grid where none does.

    Each trial's validations come when they were recorded to come; what a strategy computes takes no time.
    """
    limit = table.seconds / slots
    events: list[tuple[float, int, int, Curve, int, float]] = []  # when, order, trial, curve, place, its start
    order = 0

    def begin(now: float) -> None:
        nonlocal order
        asked = strategy.ask()
        if asked is not None:
            curve = table.nearest(asked[1])
            order += 1
            heapq.heappush(events, (now + curve.seconds[0], order, asked[0], curve, 0, now))

    try:
        for _ in range(slots):
            begin(0.0)
        while events:
            now, _, number, curve, place, start = heapq.heappop(events)
            if now >= limit:
                break
            if curve.values[place] >= goal:
                return now
            stop = strategy.report(number, place + 1, curve.values[place])
            last = place + 1 == len(curve.values)
            if stop or last:
                values = curve.values[: place + 1]
                strategy.end(number, values, seconds=curve.seconds[place], stopped=stop)
                begin(now)
                continue
            order += 1
            heapq.heappush(events, (start + curve.seconds[place + 1], order, number, curve, place + 1, start))
    finally:
        strategy.close()
    return limit


def space_of(table: Table) -> dict[str, Any]:
    """The grid as a search space in medray's grammar: numbers as ranges, all else as choices."""
    rules: dict[str, Any] = {}
    for path, values in table.grid.items():
        if not isinstance(values[0], float | int):
            rules[path] = {"choice": list(values)}
            continue
        rules[path] = {"float": [float(values[0]), float(values[-1])]} | ({"log": True} if path in LOGARITHMIC else {})
    return rules


def default_of(table: Table) -> dict[str, Any]:
    """The plan's own, on the grid."""
    plain = dict(zip(table.grid, table.default, strict=True))
    return {path: float(value) if isinstance(value, int) else value for path, value in plain.items()}


class Ours:
    """A study of medray's, in a folder that goes with it."""

    def __init__(self, table: Table, seed: int, **config: Any) -> None:
        from medray.config.schema import StudyConfig
        from medray.search.driver import StudyDriver
        from medray.search.space import Space
        from medray.search.storage import MemoryFile

        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self._objective = table.objective
        self._driver = StudyDriver(
            Space.parse(space_of(table)),
            StudyConfig(trials=TRIALS, seed=seed, **config),
            {table.objective: "max"},
            Path(self._folder.name),
            default_of(table),
            file=MemoryFile(),
        )

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        task = self._driver.ask()
        return None if task is None else (task.number, task.params)

    def report(self, number: int, step: int, value: float) -> bool:
        return self._driver.report(number, step, step / VALIDATIONS, {self._objective: value})

    def end(self, number: int, values: tuple[float, ...], *, seconds: float, stopped: bool) -> None:
        from medray.search.trial import TrialOutcome

        if stopped:
            self._driver.prune(number)
        else:
            self._driver.complete(number, TrialOutcome(metrics={self._objective: max(values)}, seconds=seconds))

    def close(self) -> None:
        self._driver.close()
        self._folder.cleanup()


class Plain:
    """Optuna's ask and tell, with a sampler and perhaps a pruner of its own."""

    def __init__(self, table: Table, sampler: Any, pruner: Any = None, *, name: str | None = None) -> None:
        import optuna

        from medray.search.space import Space

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = Space.parse(space_of(table))
        pruner = pruner or optuna.pruners.NopPruner()
        # Hyperband draws a trial's bracket from the study's name, which is random where none is given.
        self._study = optuna.create_study(study_name=name, direction="maximize", sampler=sampler, pruner=pruner)
        self._study.enqueue_trial(self._space.encode(default_of(table)))
        self._trials: dict[int, Any] = {}

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        trial = self._study.ask()
        self._trials[trial.number] = trial
        return trial.number, self._space.suggest(trial)

    def report(self, number: int, step: int, value: float) -> bool:
        trial = self._trials[number]
        trial.report(value, step)
        return step < VALIDATIONS and bool(trial.should_prune())

    def end(self, number: int, values: tuple[float, ...], *, seconds: float, stopped: bool) -> None:  # noqa: ARG002
        from optuna.trial import TrialState

        trial = self._trials.pop(number)
        self._study.tell(trial, None if stopped else max(values), state=TrialState.PRUNED if stopped else None)

    def close(self) -> None:
        pass


class Tune:
    """Ray Tune's OptunaSearch with its asynchronous successive halving, called as Tune calls them."""

    def __init__(self, table: Table, seed: int, *, reduction: int) -> None:
        import optuna
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        from medray.search.space import Space

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space, self._objective = Space.parse(space_of(table)), table.objective
        self._space = space

        def define(trial: Any) -> None:
            space.suggest(trial)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._search = OptunaSearch(
                space=define,
                metric=table.objective,
                mode="max",
                seed=seed,
                points_to_evaluate=[space.encode(default_of(table))],
            )
        self._asha = ASHAScheduler(
            metric=table.objective, mode="max", max_t=VALIDATIONS, grace_period=1, reduction_factor=reduction
        )
        self._count = 0
        self._trials: dict[int, Any] = {}

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        number, self._count = self._count, self._count + 1
        trial = SimpleNamespace(trial_id=str(number))
        params = self._search.suggest(trial.trial_id)
        if params is None:
            return None
        self._trials[number] = trial
        self._asha.on_trial_add(None, trial)
        return number, params

    def report(self, number: int, step: int, value: float) -> bool:
        result = {self._objective: value, "training_iteration": step}
        decision = self._asha.on_trial_result(None, self._trials[number], result)
        self._search.on_trial_result(str(number), result)
        return step < VALIDATIONS and decision == "STOP"

    def end(self, number: int, values: tuple[float, ...], *, seconds: float, stopped: bool) -> None:  # noqa: ARG002
        # Tune hands over the last result, whether the scheduler stopped the trial or not.
        result = {self._objective: values[-1], "training_iteration": len(values)}
        self._asha.on_trial_complete(None, self._trials[number], result)
        self._search.on_trial_complete(str(number), result)

    def close(self) -> None:
        pass


def random(table: Table, seed: int) -> Strategy:
    """Random search."""
    import optuna

    return Plain(table, optuna.samplers.RandomSampler(seed=seed))


def tpe(table: Table, seed: int, *, multivariate: bool) -> Strategy:
    """Optuna's TPE without early stops."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Plain(table, optuna.samplers.TPESampler(seed=seed, multivariate=multivariate))


def hyperband(table: Table, seed: int) -> Strategy:
    """Optuna's Hyperband, whose TPE learns in each bracket apart, as BOHB's does."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=VALIDATIONS, reduction_factor=3)
        return Plain(table, optuna.samplers.TPESampler(seed=seed), pruner, name=f"replay {seed}")
