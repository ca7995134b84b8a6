"""What one trial tells of its costs; training and measuring are faked."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medray.config.selection import SelectConfig
from medray.search.selection import Chooser
from medray.search.trial import TrialOutcome, TrialTask
from medray.train.progress import Progress
from medray.workflows import trial as module
from medray.workflows.trial import TrialPayload, run_trial
from tests.unit.workflows.test_selecting import costs

MODEL = torch.nn.Linear(3, 2)


class Worker:
    """Runs a trial that validates once, and keeps what it reported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: Any, stopped: str = "finished") -> None:
        self.looks, self.asked, self.told = list(looks), list[dict[str, Any]](), list[dict[str, Any]]()
        self.stopped, self.trained = stopped, 0
        monkeypatch.setattr(module, "costs_of", self.costs_of)
        monkeypatch.setattr(module, "untrained", lambda *_: SimpleNamespace(lead=SimpleNamespace(model=MODEL)))
        monkeypatch.setattr(module, "train_model", self.train_model)

    def costs_of(self, _recipe: Any, _candidate: Any, _folder: Path, **how: Any) -> Any:
        self.asked.append(how)
        time.sleep(0.02)
        return self.looks.pop(0)

    def train_model(self, *_: Any, on_validation: Any, **__: Any) -> Any:
        self.trained += 1
        on_validation(Progress(epoch=1, step=5, fraction=0.5, seconds=3.0, metrics={"val/auc": 0.6}))
        fit = SimpleNamespace(best={"val/auc": 0.7}, seconds=6.0, peak_memory_mb=90.0, stopped=self.stopped)
        return SimpleNamespace(model=MODEL, fit=fit)

    def run(self, directory: Path, limits: dict[str, float], *, number: int = 1) -> TrialOutcome:
        chooser = Chooser(select=SelectConfig.model_validate({"limits": limits}))
        recipe: Any = SimpleNamespace(directory=str(directory), experiment=lambda *_, **__: None)
        payload = TrialPayload(
            recipe=recipe, objective=("val/auc", "max"), objectives=("val/auc", "latency_ms"), chooser=chooser
        )
        task = TrialTask(number=number, params={}, directory=directory, seed=0, is_default=number == 0, payload=payload)

        def report(told: Any) -> bool:
            self.told.append(dict(told))
            return False

        return run_trial(task, report)


def test_each_report_tells_what_the_trial_costs_and_how_long_that_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = Worker(monkeypatch, costs(10.0))
    outcome = worker.run(tmp_path, {"latency_ms": 50.0})
    (told,) = worker.told
    assert told["costs"]["latency_ms"] == 10.0 and told["costs"]["memory_mb"] == 500.0
    assert told["metrics"] == {"val/auc": 0.6, "latency_ms": 10.0}, "its objectives, as far as they are known"
    assert 0.02 <= told["measuring"] == outcome.measuring
    assert outcome.costs == {**costs(10.0).values, "parameters": 8.0}
    assert outcome.metrics["seconds"] == 6.0 and outcome.metrics["val/auc"] == 0.7


def test_one_that_surely_breaks_a_limit_is_refused_with_its_costs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = Worker(monkeypatch, costs(200.0), costs(200.0))
    outcome = worker.run(tmp_path, {"latency_ms": 50.0})
    assert (outcome.stopped, outcome.extras["refused"], worker.trained) == ("refused", ["latency_ms"], 0)
    assert outcome.costs["latency_ms"] == 200.0 and outcome.measuring >= 0.02
    assert worker.run(tmp_path, {"latency_ms": 50.0}, number=0).stopped == "finished", "the default is needed"


def test_a_second_look_with_trained_weights_counts_as_measuring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = Worker(monkeypatch, costs(10.0, fallen="not onnx"), costs(7.0))
    outcome = worker.run(tmp_path, {"latency_ms": 50.0})
    assert [how.get("trained", True) for how in worker.asked] == [False, True]
    assert outcome.costs["latency_ms"] == outcome.metrics["latency_ms"] == 7.0
    assert outcome.measuring >= worker.told[0]["measuring"] + 0.02


def test_nothing_is_measured_where_nobody_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = Worker(monkeypatch)
    outcome = worker.run(tmp_path, {})
    assert not worker.asked and worker.told[0]["costs"] == {} and outcome.costs == {"parameters": 8.0}
