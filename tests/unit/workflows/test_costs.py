"""What a network costs: what is remembered, and what is concluded from it; the measuring itself is in integration/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medray.errors import BundleError
from medray.workflows import costs as measuring
from medray.workflows.champion import Candidate
from medray.workflows.costs import Costs, costs_of, remembered, untrained
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from tests.unit.workflows.test_selecting import costs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("costs")
    prepare_directory("phantom://xray-nodules?cases=14&size=32", folder)
    explicit = {"model": {"name": "small_cnn", "feature_size": 4}, "device": "cpu"}
    return Recipe(directory=str(folder), explicit=explicit, cache=str(folder / "cache"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes of each measuring that was not remembered."""
    made: list[int] = []

    def measure(_recipe: Recipe, _candidate: Candidate, *_: Any, processes: int, **__: Any) -> Costs:
        made.append(processes)
        return costs(10.0, processes=processes)

    monkeypatch.setattr(measuring, "_measure", measure)
    return made


def test_costs_are_json(tmp_path: Path) -> None:
    found = costs(10.0)
    assert Costs.from_json(found.to_json()) == found
    for text in ("", "{}", "[1]", found.to_json().replace("latency_ms", "latency")):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        assert remembered(tmp_path / "x.json") is None
    assert remembered(tmp_path / "nothing.json") is None


def test_an_architecture_is_measured_once(recipe: Recipe, measured: list[int], tmp_path: Path) -> None:
    def look(params: dict[str, Any] | None = None, **how: Any) -> Costs:
        return costs_of(recipe, untrained(recipe, recipe.experiment(params or {})), tmp_path, trained=False, **how)

    look()
    look({"optim.lr": 0.5})
    assert measured == [1], "what was learnt, and how, costs nothing to run"
    look({"model.feature_size": 8})
    look({"preprocess.size": [48, 48]})
    assert measured == [1] * 3, "another width, another input"
    assert look(quiet=True).is_quiet and look(quiet=True).is_quiet and look().is_quiet
    assert measured == [1] * 3 + [measuring.QUIET]
    look(afresh=True)
    assert measured[-1] == 1


def test_a_look_at_random_weights_does_not_stand_for_trained_ones(
    recipe: Recipe, measured: list[int], tmp_path: Path
) -> None:
    candidate = untrained(recipe, recipe.experiment())
    assert not costs_of(recipe, candidate, tmp_path, trained=False).trained
    assert costs_of(recipe, candidate, tmp_path).trained and costs_of(recipe, candidate, tmp_path).trained
    assert costs_of(recipe, candidate, tmp_path, trained=False).trained
    assert len(measured) == 2


def test_a_trial_is_refused_only_where_no_quieter_machine_could_help() -> None:
    slow = costs(100.0, fastest_ms=80.0)
    assert slow.surely_breaks({"latency_ms": 50.0, "size_mb": 2.0}) == {"latency_ms": 80.0}
    assert replace(slow, others=0.5).surely_breaks({"latency_ms": 50.0}) == {}
    assert replace(slow, fallen="not torch bf16: …").surely_breaks({"latency_ms": 50.0}) == {}
    assert slow.surely_breaks({"memory_mb": 400.0, "parameters": 10.0, "size_mb": 0.5}) == {
        "memory_mb": 499.0, "parameters": 1000.0, "size_mb": 1.0,
    }  # fmt: skip


def test_it_is_said_how_it_was_measured() -> None:
    assert costs(10.0).shown == (
        "onnx fp32 on ward-3 (CPU, 2 cores), 2 threads, input 1 x 32 x 32, 90 calls in 3 processes"
    )
    assert "other programs took 40% of the CPU" in costs(10.0, others=0.4).shown


@pytest.mark.parametrize(
    ("done", "said"),
    [
        (SimpleNamespace(stdout="", stderr="Traceback\nMemoryError: no room", returncode=1), "MemoryError: no room"),
        (SimpleNamespace(stdout="", stderr="", returncode=-9), "ended with -9 .it said nothing"),
        (SimpleNamespace(stdout='{"blocks": [], "peak_mb": 1.0}', stderr="", returncode=0), "no call was timed"),
    ],
)
def test_a_process_that_dies_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, done: SimpleNamespace, said: str
) -> None:
    monkeypatch.setattr(measuring.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(BundleError, match=said):
        measuring._in_a_process({"engine": "onnx", "precision": "fp32", "seconds": 1.0})


def test_a_process_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: Any, *, timeout: float, **_: Any) -> None:
        raise measuring.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(measuring.subprocess, "run", hang)
    with pytest.raises(BundleError, match="did not answer within 120 s"):
        measuring._in_a_process({"engine": "onnx", "precision": "fp32", "seconds": 1.0})
