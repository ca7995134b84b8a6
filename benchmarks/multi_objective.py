"""Two objectives, AUC and measured latency: how much more does the search find than random draws in the same time?

Each network of a grid is trained once on BreastMNIST, its learning curve and seconds are kept, and its latency is
measured as a study does. Studies are then replayed over that table with a virtual clock: a trial takes the seconds that
its training took until it ended or was stopped. Random draws have the time of twenty full trainings, the others as
much. The hypervolume is a share of the box between the table's best and worst values.

    python -m benchmarks multi_objective
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Result, Target, over_seeds, shared_data
from medray.config.schema import StudyConfig
from medray.search import pareto
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import Direction, TrialOutcome
from medray.workflows.champion import Candidate
from medray.workflows.costs import costs_of
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.training import train_model

GRID: Mapping[str, Sequence[Any]] = {
    "model.feature_size": (4, 8, 16, 32),
    "model.depth": (2, 3),
    "optim.lr": (1e-4, 1e-3, 1e-2),
    "model.dropout": (0.0, 0.5),
    "optim.name": ("adamw", "sgd"),
}
QUICK_GRID: Mapping[str, Sequence[Any]] = {"model.feature_size": (4, 16), "optim.lr": (1e-4, 1e-2)}
OBJECTIVES: Mapping[str, Direction] = {"val/auc": "max", "latency_ms": "min"}
STRATEGIES = {
    "medray": {"sampler": "tpe", "pruner": "curve"},
    "random": {"sampler": "random", "pruner": "none"},
    "TPE, nothing stopped": {"sampler": "tpe", "pruner": "none"},
    "NSGA-II, nothing stopped": {"sampler": "nsga2", "pruner": "none"},
}
SEEDS, QUICK_SEEDS = 5, 2
TRIALS, QUICK_TRIALS = 20, 4
"""Full trainings that the clock allows."""
EPOCHS = 9


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration of the table: AUC after each ninth of the training, its seconds, and what it costs."""

    curve: tuple[float, ...]
    seconds: float
    latency_ms: float

    @property
    def values(self) -> tuple[float, float]:
        """Of the objectives, in their order: that of the best epoch."""
        return max(self.curve), self.latency_ms


Table = Mapping[tuple[Any, ...], Row]


def run(quick: bool) -> Result:
    """Make the table, replay it, compare."""
    grid = QUICK_GRID if quick else GRID
    with tempfile.TemporaryDirectory(prefix="medray-bench-") as folder:
        table = _table(Path(folder), grid, quick)
        seconds = (QUICK_TRIALS if quick else TRIALS) * float(np.mean([row.seconds for row in table.values()]))
        volumes = {
            name: [
                _replay(Path(folder) / f"{number}-{seed}", grid, table, settings, seed, seconds)
                for seed in range(QUICK_SEEDS if quick else SEEDS)
            ]
            for number, (name, settings) in enumerate(STRATEGIES.items())
        }
    chance = volumes["random"]
    figures = {
        name: {
            "hypervolume": over_seeds(found),
            "over_random": over_seeds([ours / max(base, 1e-9) for ours, base in zip(found, chance, strict=True)]),
        }
        for name, found in volumes.items()
    }
    costs, best = [row.latency_ms for row in table.values()], [max(row.curve) for row in table.values()]
    notes = [
        f"{len(table)} configurations of small_cnn, {EPOCHS} epochs each; AUC {min(best):.3f} to {max(best):.3f}, "
        f"latency {min(costs):.3g} to {max(costs):.3g} ms.",
        "The clock counts training alone; a study's own work between trials is in the benchmark of overhead.",
    ]
    return Result(
        figures=figures.pop("medray"),
        targets={"over_random": Target(op=">=", value=1.15)},
        peers=figures,
        notes=notes,
    )


def _table(folder: Path, grid: Mapping[str, Sequence[Any]], quick: bool) -> Table:
    source = "phantom://xray-nodules?cases=24&size=28" if quick else str(shared_data() / "medmnist" / "breastmnist.npz")
    prepare_directory(source, folder)
    explicit = {
        "model": {"name": "small_cnn", "depth": 2},
        "train": {"epochs": EPOCHS, "validate_every": 1, "batch_size": 32},
        "augment": {"strength": 0.0},
        "device": "cpu",
    }
    recipe = Recipe(directory=str(folder), explicit=explicit, cache=str(folder / "cache"))
    rows: dict[tuple[Any, ...], Row] = {}
    for number, values in enumerate(itertools.product(*grid.values())):
        experiment = recipe.experiment(dict(zip(grid, values, strict=True)))
        trained = train_model(recipe, experiment, folder / "table" / str(number))
        # Dropout and optimiser cost nothing to run: the widths and depths are measured once each.
        costs = costs_of(recipe, Candidate(name="table", members=(trained,)), folder / "costs")
        rows[values] = Row(
            curve=tuple(float(entry["val/auc"]) for entry in trained.fit.history),
            seconds=trained.fit.seconds,
            latency_ms=costs.latency_ms.value,
        )
    return rows


def _replay(
    folder: Path,
    grid: Mapping[str, Sequence[Any]],
    table: Table,
    settings: Mapping[str, str],
    seed: int,
    seconds: float,
) -> float:
    """The hypervolume of a study over the table when its time is over."""
    space = Space.parse({path: {"choice": list(values)} for path, values in grid.items()})
    config = StudyConfig.model_validate({**settings, "seed": seed, "trials": 100})
    default = {path: values[len(values) // 2] for path, values in grid.items()}
    clock, done = 0.0, []
    with StudyDriver(space, config, OBJECTIVES, folder, default) as driver:
        while clock < seconds and (task := driver.ask()) is not None:
            row = table[tuple(task.params[path] for path in grid)]
            stopped = False
            for epoch, auc in enumerate(row.curve, start=1):
                clock += row.seconds / len(row.curve)
                metrics = {"val/auc": auc, "latency_ms": row.latency_ms}
                stopped = clock > seconds or driver.report(task.number, epoch, epoch / len(row.curve), metrics)
                if stopped:
                    break
            if stopped:
                driver.prune(task.number)
                continue
            done.append(row.values)
            driver.complete(task.number, TrialOutcome(metrics=dict(zip(OBJECTIVES, row.values, strict=True))))
    return _share(done, table)


def _share(values: Sequence[tuple[float, float]], table: Table) -> float:
    """Hypervolume of some results as a share of the box that the whole table spans; latency on a logarithmic scale."""
    ways = list(OBJECTIVES.values())

    def losses(rows: Sequence[tuple[float, float]]) -> pareto.Floats:
        return pareto.losses([(auc, float(np.log(latency))) for auc, latency in rows], ways)

    everything = losses([row.values for row in table.values()])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scaled = (losses(values) - low) / np.where(high > low, high - low, 1.0)
    return pareto.hypervolume(scaled, [1.0, 1.0])
