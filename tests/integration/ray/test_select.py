"""A study with a limit on latency, measured for real: one of its networks is far too slow, and it is not crowned."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import yaml

from medray.config.selection import SelectConfig
from medray.search.selection import Chooser
from medray.workflows import study
from medray.workflows.costs import costs_of, untrained
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe

LIMIT, FAST, SLOW = 15.0, 8, 384
"""Milliseconds; widths of a network that takes a fraction of one here, and of one that takes some hundreds."""
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


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
def test_a_study_never_crowns_a_network_that_breaks_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "time_step", lambda *_, **__: None)  # a busy machine must not talk it out of searching
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
