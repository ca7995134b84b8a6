"""How soon does the search find what is best? Recorded learning curves, replayed by each strategy on a virtual clock.

Three tables of a fixed grid each, recorded on real data with small networks (``python -m benchmarks.replay record
NAME``, see :mod:`benchmarks._replay_tables`). A strategy's settings are chosen on two tables and judged on the third,
in turn, ours and the others' alike. The figure is the simulated time to a validation within 1 % of the table's best.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from statistics import mean
from typing import Any

import numpy as np

from benchmarks import _replay_strategies as strategies
from benchmarks._replay_strategies import Make, simulate
from benchmarks._replay_tables import SETTINGS, TABLES, Table, load, record, thread_limits
from benchmarks.common import Figure, Result, Target

SEEDS, CHOOSING = 50, 10
OURS = "ours"
NEAR = 0.01
VARIANTS: Mapping[str, Mapping[str, Make]] = {
    OURS: {
        pruner: partial(strategies.Ours, pruner=pruner, sampler="tpe") for pruner in ("asha", "median", "curve", "none")
    },
    "random": {"": strategies.random},
    "TPE": {
        "multivariate": partial(strategies.tpe, multivariate=True),
        "each alone": partial(strategies.tpe, multivariate=False),
    },
    "OptunaSearch + ASHA": {f"by {reduction}": partial(strategies.Tune, reduction=reduction) for reduction in (3, 4)},
    "Hyperband + TPE": {"": strategies.hyperband},
}
Job = tuple[str, str, str, int]
"""Strategy, variant, table and seed of one replay."""
NOTES = (
    "hpbandster and ConfigSpace are not in the environment; Optuna's Hyperband with TPE stands for BOHB.",
    f"{strategies.SLOTS} trials at once; seconds are of one core, training and validation; every strategy begins with "
    "the plan's default; one that never gets there counts as the time of the whole grid.",
)


def run(quick: bool) -> Result:
    """Figures: by table, ours over random's time, and over the best other's, with intervals over seeds."""
    missing = [name for name in SETTINGS if not (TABLES / f"{name}.json").is_file()]
    if missing:
        raise SystemExit(
            f"not recorded: {', '.join(missing)}. Record with: python -m benchmarks.replay record {missing[0]}"
        )
    tables = {name: _table(name) for name in SETTINGS}
    seeds, choosing = (3, 2) if quick else (SEEDS, CHOOSING)
    figures: dict[str, Figure] = {}
    peers: dict[str, dict[str, Figure]] = {name: {} for name in VARIANTS if name != OURS}
    notes, ratios = list(NOTES), []
    chosen = _choices(list(tables), range(1000, 1000 + choosing))
    found = replayed((*key, seed) for key in chosen for seed in range(seeds))
    for name, table in tables.items():
        times: dict[str, np.ndarray[Any, Any]] = {}
        for strategy, variant, where in chosen:
            if where == name:
                times[strategy] = np.asarray([found[strategy, variant, name, seed] for seed in range(seeds)])
                if variant:
                    notes.append(f"{name}: {strategy} chosen on the other tables: {variant}.")
        best = min((strategy for strategy in times if strategy != OURS), key=lambda key: times[key].mean())
        figures[f"{name}: seconds"] = _mean(times[OURS])
        figures[f"{name}: over random"] = _ratio(times[OURS], times["random"])
        figures[f"{name}: over the best other"] = _ratio(times[OURS], times[best])
        for strategy, shown in peers.items():
            shown[f"{name}: seconds"] = _mean(times[strategy])
            shown[f"{name}: over random"] = _ratio(times[strategy], times["random"])
        ratios.append((times[OURS], times["random"], times[best]))
        reach = sum(max(curve.values) >= goal_of(table) for curve in table.curves.values())
        notes.append(
            f"{name}: {reach} of {len(table.curves)} points come within 1 % of {table.best:.4f}; best other: {best}."
        )
    figures["over random"] = _mean_ratio([(ours, other) for ours, other, _ in ratios])
    figures["over the best other"] = _mean_ratio([(ours, other) for ours, _, other in ratios])
    targets = (
        {} if quick else {"over random": Target(op="<=", value=0.5), "over the best other": Target(op="<=", value=0.9)}
    )
    return Result(figures=figures, targets=targets, peers=peers, notes=notes)


def goal_of(table: Table) -> float:
    """The best of all validations, less 1 %."""
    return table.best * (1 - NEAR)


def replayed(jobs: Iterable[Job]) -> dict[Job, float]:
    """Virtual seconds to the goal of each job, by as many processes as there are cores: the clock is not theirs."""
    jobs = list(dict.fromkeys(jobs))
    thread_limits()  # of the processes to come
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        return dict(zip(jobs, pool.map(replay_one, jobs, chunksize=5), strict=True))


def replay_one(job: Job) -> float:
    """Virtual seconds to the goal."""
    strategy, variant, name, seed = job
    table = _table(name)
    return simulate(VARIANTS[strategy][variant](table, seed), table, goal_of(table))


_table = cache(load)


def _choices(tables: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, str]]:
    """For each strategy and table the variant that is chosen on the other tables."""
    found = replayed(
        (strategy, variant, name, seed)
        for strategy, variants in VARIANTS.items()
        if len(variants) > 1
        for variant in variants
        for name in tables
        for seed in seeds
    )
    chosen = []
    for strategy, variants in VARIANTS.items():
        for name in tables:
            others = [other for other in tables if other != name]
            times = {
                variant: [np.asarray([found[strategy, variant, other, seed] for seed in seeds]) for other in others]
                for variant in variants
                if len(variants) > 1
            }
            chosen.append((strategy, choose(times) if times else next(iter(variants)), name))
    return chosen


def choose(times: Mapping[str, Sequence[np.ndarray[Any, Any]]]) -> str:
    """The variant that is quickest over some tables, each counting alike: by the geometric mean of its mean times.

    Args:
        times: variant to its seconds by seed, table by table.
    """
    return min(times, key=lambda name: mean(math.log(max(found.mean(), 1e-9)) for found in times[name]))


def _mean(values: np.ndarray[Any, Any]) -> Figure:
    draws = _draws(values).mean(axis=1)
    return Figure(value=float(values.mean()), low=_at(draws, 0.025), high=_at(draws, 0.975), unit="s")


def _ratio(ours: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> Figure:
    return _mean_ratio([(ours, other)])


def _mean_ratio(pairs: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> Figure:
    """The mean over tables of the ratio of mean times; seeds are drawn anew on both sides."""
    value = mean(float(ours.mean() / other.mean()) for ours, other in pairs)
    draws = np.mean(
        [_draws(ours, seed=1).mean(axis=1) / _draws(other, seed=2).mean(axis=1) for ours, other in pairs], axis=0
    )
    return Figure(value=value, low=_at(draws, 0.025), high=_at(draws, 0.975))


def _draws(values: np.ndarray[Any, Any], *, seed: int = 0, count: int = 2000) -> np.ndarray[Any, Any]:
    return values[np.random.default_rng(seed).integers(len(values), size=(count, len(values)))]


def _at(draws: np.ndarray[Any, Any], share: float) -> float:
    return float(np.quantile(draws, share))


def main() -> None:
    """``record NAME``: train what the table still lacks, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("what", choices=["record"])
    parser.add_argument("table", choices=list(SETTINGS))
    asked = parser.parse_args()
    thread_limits()
    print(record(asked.table))


if __name__ == "__main__":
    main()
