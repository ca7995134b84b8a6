"""What workers log reaches the run's log, labelled, from every kind of process that Ray starts for us."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medray import logs
from medray.config.schema import StudyConfig
from medray.engines.ray.remote import call_all
from medray.engines.ray.train import GroupSize, run_group
from medray.engines.ray.tune import run_trials
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import Report, TrialOutcome, TrialTask
from medray.train.progress import Progress
from medray.train.runtime import Runtime


@pytest.fixture(autouse=True, scope="module")
def _functions_of_this_file(ray_session: None) -> Iterator[None]:
    """Workers can't import a test: its functions travel by value."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def trial(task: TrialTask, report: Report) -> TrialOutcome:
    logging.getLogger("medray.train").info("a trial speaks", extra={"number": task.number})
    report({"fraction": 1.0, "step": 1, "metrics": {"val/dice": 0.5}})
    return TrialOutcome(metrics={"val/dice": 0.5})


def final(task: str) -> str:
    logging.getLogger("medray.train").warning("a final fit speaks")
    return task


def member(task: Any, runtime: Runtime, report: Callable[[Progress], bool]) -> None:
    logging.getLogger("medray.train").info("a member speaks")


def recorded(folder: Path, event: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["event"] == event]


def test_trials(tmp_path: Path) -> None:
    space = Space.parse({"optim.lr": {"float": [1e-4, 1e-2], "log": True}})
    config = StudyConfig(trials=3, pruner="none")
    with (
        logs.recording(tmp_path, run="seg"),
        StudyDriver(space, config, {"val/dice": "max"}, tmp_path, {"optim.lr": 1e-3}) as driver,
    ):
        run_trials(driver, trial, directory=tmp_path, cpus_per_trial=1, concurrency=2)
    rows = recorded(tmp_path, "a trial speaks")
    assert sorted(row["trial"] for row in rows) == [0, 1, 2]
    assert all(row["run"] == "seg" and row["worker"] and row["trial"] == row["number"] for row in rows)
    assert not (tmp_path / logs.INBOX).exists()


def test_calls_and_groups(tmp_path: Path) -> None:
    with logs.recording(tmp_path, run="seg"):
        assert call_all(final, ["a", "b"], cpus=1) == ["a", "b"]
        logs.bind(trial=7)
        run_group(member, None, GroupSize(workers=2))
    assert [row["run"] for row in recorded(tmp_path, "a final fit speaks")] == ["seg", "seg"]
    rows = recorded(tmp_path, "a member speaks")
    assert sorted((row["trial"], row["rank"]) for row in rows) == [(7, 0), (7, 1)]


def test_workers_that_are_reused_outside_a_recorded_run_are_silent(tmp_path: Path) -> None:
    with logs.recording(tmp_path, run="seg"):
        call_all(final, ["a"], cpus=1)
    before = (tmp_path / "log.jsonl").read_bytes()
    call_all(final, ["a"], cpus=1)
    assert (tmp_path / "log.jsonl").read_bytes() == before and not (tmp_path / logs.INBOX).exists()
