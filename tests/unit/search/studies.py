"""Small studies for tests, and trials that end at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medray.config.schema import StudyConfig
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import TrialOutcome, TrialTask

SPACE = {
    "model.name": {"choice": ["unet", "swin"]},
    "optim.lr": {"float": [1e-4, 1e-2], "log": True},
    "model.feature_size": {"choice": [12, 24], "when": {"model.name": "swin"}},
    "train.patch_size": {"choice": [[32, 32], [64, 64]]},
}
NUMERIC = {"optim.lr": {"float": [1e-4, 1e-2], "log": True}, "loss.alpha": {"float": [0.1, 0.9]}, "n": {"int": [1, 9]}}
DEFAULT = {"model.name": "unet", "optim.lr": 1e-3, "train.patch_size": [32, 32], "model.feature_size": None}
OUTSIDE = DEFAULT | {"optim.lr": 0.5}


def study(
    directory: Path,
    *,
    space: Mapping[str, Any] = SPACE,
    objectives: Mapping[str, Any] | None = None,
    default: Mapping[str, Any] = DEFAULT,
    **config: Any,
) -> StudyDriver:
    settings = {"trials": 12, "pruner": "none"} | config
    return StudyDriver(
        Space.parse(space), StudyConfig(**settings), objectives or {"val/dice": "max"}, directory, default
    )


def score(params: Mapping[str, Any]) -> float:
    good = -abs(math.log10(params["optim.lr"]) + 2.5) - 0.3 * abs(params.get("loss.alpha", 0.5) - 0.3)
    return good + (0.2 if params.get("model.name") == "swin" else 0.0)


def finish(driver: StudyDriver, task: TrialTask) -> None:
    """One trial, validated at each rung, as a worker would run it."""
    value = score(task.params)
    for fraction in (1 / 9, 1 / 3, 1.0):
        metrics = {"val/dice": value - (1 - fraction), "val/loss": 1.0}
        if driver.report(task.number, round(99 * fraction), fraction, metrics):
            driver.prune(task.number)
            return
    driver.complete(task.number, TrialOutcome(metrics={"val/dice": value, "latency_ms": abs(value) * 10}, seconds=1.0))


def run(driver: StudyDriver, count: int = 10_000) -> list[dict[str, Any]]:
    drawn = []
    while len(drawn) < count and (task := driver.ask()) is not None:
        drawn.append(dict(task.params))
        finish(driver, task)
    return drawn
