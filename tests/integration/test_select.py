"""A study with a limit on latency, measured for real: one of its networks is far too slow, and it is not crowned.

Its trials run in this process, one after another: what Ray does with trials is tested in ``ray/``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from medray.config.selection import SelectConfig
from medray.engines.ray.session import RaySession
from medray.search.driver import StudyDriver
from medray.search.selection import Chooser
from medray.search.trial import TrialFunction, TrialReport
from medray.workflows import forecast, study
from medray.workflows.costs import costs_of, untrained
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe

LIMIT, FAST, SLOW = 3.0, 8, 256
"""Milliseconds; widths of a network that takes a fraction of one, and of one that takes ten and more."""
SPACE = f"""
data: phantom://xray-nodules?cases=24&size=64
device: cpu
model: {{name: small_cnn, feature_size: {FAST}, depth: 2}}
augment: {{strength: 0.0}}
preprocess: {{size: [64, 64]}}
train: {{epochs: 1, batch_size: 8, precision: fp32}}
study:
  name: limited
  budget: 20min
  trials: 2
  sampler: random
  seed: 4
  pruner: none
  ensemble: false
  objectives: {{val/auc: max, latency_ms: min}}
  select: {{limits: {{latency_ms: {LIMIT}}}}}
space:
  model.feature_size: {{choice: [{FAST}, {SLOW}]}}
"""


@contextlib.contextmanager
def no_session(**_: Any) -> Iterator[RaySession]:
    yield RaySession(cpus=2, gpus=0, is_local=True, most_cpus=2)


def run_here(driver: StudyDriver, function: TrialFunction, *, payload: Any, trial_seconds: float, **_: Any) -> None:
    """``run_trials`` without Ray."""
    while (task := driver.ask(seconds=trial_seconds)) is not None:

        def report(told: TrialReport, number: int = task.number) -> bool:
            row: dict[str, Any] = dict(told)
            return driver.report(number, row.pop("step"), row.pop("fraction"), row.pop("metrics"), **row)

        driver.complete(task.number, function(replace(task, payload=payload), report))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ray_session", no_session)
    monkeypatch.setattr(study, "run_trials", run_here)
    monkeypatch.setattr(study, "call_all", lambda function, tasks, **_: [function(task) for task in tasks])
    monkeypatch.setattr(
        forecast, "time_step", lambda *_, **__: None
    )  # a busy machine must not talk it out of searching


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("here")
def test_a_study_never_crowns_a_network_that_breaks_the_limit(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")
    result = study.tune(space, runs=tmp_path)
    trials = optuna.load_study(study_name=None, storage=f"sqlite:///{result.directory / 'study.db'}").trials
    slow = [trial for trial in trials if trial.params["model.feature_size"] == SLOW]
    assert slow and all(trial.constraints["latency_ms"] > 0 for trial in slow)
    assert all(trial.constraints["latency_ms"] <= 0 for trial in trials if trial not in slow)
    bundle = yaml.safe_load((result.bundle / "bundle.json").read_text(encoding="utf-8"))
    assert [member["feature_size"] for member in bundle["members"]] == [FAST]
    chosen = json.loads((result.directory / "result.json").read_text(encoding="utf-8"))["selection"]
    first = chosen["candidates"][0]
    assert first["name"] == result.champion and first["broken"] == [] and "cores" in first["measured"]
    assert first["figures"]["latency_ms"][2] <= LIMIT, "the upper end of the interval"
    report = result.report.read_text(encoding="utf-8")
    assert "Why this champion" in report and "latency_ms" in result.headline


def test_an_ensemble_is_measured_as_one(tmp_path: Path) -> None:
    prepare_directory("phantom://xray-nodules?cases=14&size=32", tmp_path)
    explicit = {"model": {"name": "small_cnn", "feature_size": 4, "depth": 2}, "device": "cpu"}
    recipe = Recipe(directory=str(tmp_path), explicit=explicit, cache=str(tmp_path / "cache"))
    one = untrained(recipe, recipe.experiment())
    pair = type(one)(name="average of 2", members=one.members * 2)
    found = costs_of(recipe, pair, tmp_path / "costs", seconds=0.2)
    assert found.parameters == 2 * sum(p.numel() for p in one.lead.model.parameters())
    assert found.size_mb * 1e6 > 4 * found.parameters and found.shape == (1, 32, 32) and found.calls >= 15
    assert found.latency_ms.low <= found.latency_ms.value <= found.latency_ms.high <= found.latency_p95_ms.high
    assert found.fastest_ms <= found.latency_ms.value and 50 < found.memory_mb.value < 10_000
    limits = {"parameters": found.parameters - 1, "size_mb": found.size_mb * 1.01}
    judged = Chooser(select=SelectConfig.model_validate({"limits": limits})).judge(found.figures)
    assert {verdict.name: verdict.kept for verdict in judged} == {"parameters": False, "size_mb": True}
