"""How a study's wall clock is spent: start-up, search, final fit, report. All times in seconds of wall clock."""

from __future__ import annotations

import math
import random
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from medray.search.pruning import MEDIAN_TRIALS, REDUCTION, RUNGS

SHORTEST_TRIAL = 8.0
"""A trial shorter than this says little: start-up and first validations fill it."""
SMALLEST_SHARE = 0.1
"""Of the search: more trials than 1/0.1 at once are cheaper by a larger budget than by shorter trials."""
TELLING_STEPS = 100
"""Optimiser steps after which networks can be told apart by more than how fast they leave their first weights."""
FEWEST = 3
"""Trials, the default among them, that make a search."""
CURVE_COST = 0.6
"""Of a full training, per trial under the rule ``curve``: .40, .45 and .65 on the tables of ``benchmarks/tables``."""
_ORDERS = 100  # random orders that the expected cost of early stops is averaged over


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A plan for what is left of a study's wall clock.

    Args:
        search: for the search, from now on.
        trial: what one trial may train for.
        trials: that are expected to begin in that time, early stops counted.
        final: for fitting the champion.
        finish: kept back for calibration, report and bundle.
    """

    search: float
    trial: float
    trials: int
    final: float
    finish: float


def plan_budget(
    total: float,
    *,
    trials: int,
    search_share: float,
    concurrency: int,
    pruner: str,
    spent: float = 0.0,
    start_up: float = 0.0,
    finish: float = 0.0,
    overhead: float = 1.0,
    measuring: float = 0.0,
    networks: float = math.inf,
    shortest: float = SHORTEST_TRIAL,
) -> Budget:
    """Share out a wall-clock budget.

    The search gets ``search_share`` of what start-up and finish leave. Each trial gets as long as the expected number
    of them, with early stops, allows; there are fewer trials rather than ones shorter than ``shortest`` and a tenth of
    it. Where not even three of those fit (or as many as are wanted), there is no search, and its time is the final
    fit's: trials that say nothing would choose by chance, and cost what the champion needs.

    Args:
        total: the whole budget.
        trials: wanted, at most.
        search_share: 0..1; 0 leaves nothing for a search, and the default alone is fitted.
        concurrency: trials at once.
        pruner: ``curve``, ``asha``, ``median`` or ``none``.
        spent: seconds of earlier processes of a resumed study, and of the stages before.
        start_up: until the first trial begins (Ray, imports, preprocessing), as estimated or measured.
        finish: of everything after the final fit.
        overhead: per trial, beside its training (building the model, opening the cache).
        measuring: of a trial, before it trains, whose network is the first of its kind.
        networks: kinds that are yet to be measured; of more trials than these the rest are like others.
        shortest: that a trial has to train to say anything.
    """
    usable = max(0.0, total - start_up - finish)
    search_end = start_up + usable * search_share
    search = max(0.0, search_end - max(spent, start_up))
    final = max(0.0, total - finish - max(search_end, spent))

    def besides(count: int) -> float:
        return overhead * count + measuring * min(count, networks)

    count, trial = _fit_trials(search, trials, max(1, concurrency), pruner, besides, shortest)
    if shortest > SHORTEST_TRIAL and count < min(trials, FEWEST):
        return Budget(search=0.0, trial=0.0, trials=0, final=search + final, finish=finish)
    return Budget(search=search, trial=trial, trials=count, final=final, finish=finish)


def _fit_trials(
    search: float, wanted: int, concurrency: int, pruner: str, besides: Callable[[int], float], shortest: float
) -> tuple[int, float]:
    """The largest number of trials whose length stays sensible, and that length.

    Args:
        besides: seconds that so many trials take beside their training, all together.
    """
    shortest = max(SHORTEST_TRIAL, shortest, SMALLEST_SHARE * search)
    most = int(concurrency * (search / (RUNGS[0] * shortest) + 1)) if search > 0 else 1
    for count in range(max(1, min(wanted, most)), 0, -1):
        # No trial begins that can't end: the last on each slot needs its full length, whatever becomes of it.
        last = min(count, concurrency)
        rounds = expected_cost(count - last, pruner) / concurrency + 1.0
        length = search / rounds - besides(count) / concurrency / rounds
        if length >= shortest:
            return count, length
    return (1, search) if search > 0 else (0, 0.0)


def expected_cost(count: int, pruner: str) -> float:
    """Full trainings that ``count`` trials cost on average if their order is random (the default runs in full)."""
    if count <= 0:
        return 0.0
    if pruner == "none":
        return float(count)
    if pruner == "curve":
        return 1.0 + CURVE_COST * (count - 1)
    if pruner == "median":
        # The better half of the others run on; the rest end at the first rung or soon after.
        judged = max(0, count - MEDIAN_TRIALS)
        return count - judged * 0.5 * (1.0 - 1.5 * RUNGS[0])
    return _asha_costs(count)[count - 1]


@cache
def _asha_costs(count: int) -> tuple[float, ...]:
    """Cost of the first 1..count trials, averaged over random orders whose ranks stay the same from rung to rung."""
    generator = random.Random(0)
    totals = [0.0] * count
    for _ in range(_ORDERS):
        rungs: tuple[list[float], ...] = tuple([] for _ in RUNGS)
        cost = 0.0
        for number in range(count):
            loss, reached = generator.random(), 1.0
            for fraction, seen in zip(RUNGS, rungs, strict=True):
                insort(seen, loss)
                if number and bisect_left(seen, loss) >= max(1, len(seen) // REDUCTION):
                    reached = fraction
                    break
            cost += reached
            totals[number] += cost / _ORDERS
    return tuple(totals)
