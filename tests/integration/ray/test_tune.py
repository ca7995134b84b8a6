"""Trials on a real Ray: what each end of a trial does to the study."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medray.config.schema import StudyConfig
from medray.errors import StudyError
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import Report, TrialEvent, TrialFunction, TrialOutcome, TrialTask

SPACE = {"optim.lr": {"float": [1e-4, 1e-2], "log": True}, "model.name": {"choice": ["unet", "swin"]}}
DEFAULT = {"optim.lr": 1e-3, "model.name": "unet"}


@pytest.fixture(autouse=True, scope="module")
def _functions_of_this_file(ray_session: None) -> Iterator[None]:
    """Workers can't import a test: its functions travel by value."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def train(task: TrialTask, report: Report) -> TrialOutcome:
    """Three validations; the larger the trial's number, the better, unless the payload says otherwise."""
    payload = task.payload or {}
    value = payload.get("values", {}).get(task.number, 0.5 + 0.01 * task.number)
    for step, fraction in ((1, 1 / 9), (3, 1 / 3), (9, 1.0)):
        time.sleep(payload.get("sleep", 0.0))
        if report({"fraction": fraction, "step": step, "metrics": {"val/dice": value * fraction}}):
            break
    extras = {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], "ended": time.time()}
    return TrialOutcome(metrics={"val/dice": value}, extras=extras)


def train_from_checkpoint(task: TrialTask, report: Report) -> TrialOutcome:
    """Each start leaves a mark in the trial's folder; trial 1 dies in its first ``deaths`` starts."""
    marks = task.directory / "starts"
    starts = len(marks.read_text(encoding="ascii")) if marks.exists() else 0
    marks.write_text("x" * (starts + 1), encoding="ascii")
    report({"fraction": 0.2 + 0.1 * starts, "step": 2 + starts, "metrics": {"val/dice": 0.1}})
    if task.number == 1 and starts < task.payload["deaths"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return TrialOutcome(metrics={"val/dice": 0.5 + task.number}, extras={"starts": starts + 1})


def raise_in(task: TrialTask, report: Report) -> TrialOutcome:
    if task.number in task.payload["numbers"]:
        raise RuntimeError(f"the loss of trial {task.number} became NaN at step 7")
    return train(task, report)


def misbehave(task: TrialTask, report: Report) -> TrialOutcome:
    if task.number == 1:
        report({"metrics": {"val/dice": 1.0}})
    if task.number == 2:
        return {"val/dice": 1.0}  # type: ignore[return-value]
    if task.number == 3:
        sys.exit("a library called exit()")
    return train(task, report)


def never_listen(task: TrialTask, report: Report) -> TrialOutcome:
    if task.number:
        report({"fraction": 0.05, "step": 1, "metrics": {"val/dice": 0.1}})
        time.sleep(3600)
    return train(task, report)


def run(
    directory: Path, function: TrialFunction, *, trials: int = 4, pruner: str = "none", **options: Any
) -> tuple[StudyDriver, list[TrialEvent]]:
    """The study, closed by its caller, and what happened."""
    from medray.engines.ray.tune import run_trials

    config = StudyConfig(trials=trials, pruner=pruner)  # type: ignore[arg-type]
    driver = StudyDriver(Space.parse(SPACE), config, {"val/dice": "max"}, directory, DEFAULT)
    events: list[TrialEvent] = []
    settings: dict[str, Any] = {
        "directory": directory,
        "cpus_per_trial": 1,
        "concurrency": 1,
        "on_event": events.append,
    }
    try:
        run_trials(driver, function, **(settings | options))
    except BaseException:
        driver.close()
        raise
    return driver, events


def test_trials_run_in_one_process_and_are_stopped_early(tmp_path: Path) -> None:
    driver, events = run(tmp_path, train, pruner="asha", payload={"values": {0: 0.5, 1: 0.9, 2: 0.1, 3: 0.95}})
    with driver:
        states = [record.state for record in driver.records()]
        assert states == ["completed", "completed", "pruned", "completed"]
        best = driver.best()
        assert best is not None and best.number == 3 and best.values == (0.95,)
        extras = [record.extras for record in driver.records() if record.state == "completed"]
        assert len({extra["pid"] for extra in extras}) == 1 and extras[0]["pid"] != os.getpid()
        assert {extra["threads"] for extra in extras} == {"1"}
    kinds = [(event.kind, event.number) for event in events if event.kind != "progress"]
    assert kinds[:2] == [("started", 0), ("completed", 0)] and ("pruned", 2) in kinds
    assert [event.fraction for event in events if event.kind == "progress" and event.number == 0][-1] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".study.lock") == ["study.db", "trials"]


def test_two_at_a_time(tmp_path: Path) -> None:
    driver, events = run(tmp_path, train, trials=6, concurrency=2, payload={"sleep": 0.6})
    with driver:
        assert driver.counts()["completed"] == 6
        assert len({record.extras["pid"] for record in driver.records()}) == 2
    running, most = set(), 0
    for event in events:
        (running.add if event.kind == "started" else running.discard)(
            event.number
        ) if event.kind != "progress" else None
        most = max(most, len(running))
    assert most == 2


def test_a_trial_that_raises_shows_its_own_traceback(tmp_path: Path) -> None:
    driver, events = run(tmp_path, raise_in, payload={"numbers": [1, 2]})
    with driver:
        assert [record.state for record in driver.records()] == ["completed", "failed", "failed", "completed"]
        text = (driver.trial_directory(1) / "error.txt").read_text(encoding="utf-8")
    assert text.startswith("Traceback") and "in raise_in" in text and "trial 1 became NaN at step 7" in text
    assert "worker.py" not in text, "the trace begins at the trial's own function"
    assert next(event.message for event in events if event.kind == "failed") == text


def test_a_default_that_raises_ends_the_study_with_the_workers_traceback(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"(?s)default trial failed.*in raise_in.*became NaN at step 7"):
        run(tmp_path, raise_in, payload={"numbers": [0]})
    driver, _ = run(tmp_path, raise_in, payload={"numbers": []})
    with driver:
        assert [record.state for record in driver.records()] == ["completed"] * 4


def test_what_a_function_gets_wrong_is_its_trials_failure(tmp_path: Path) -> None:
    driver, _ = run(tmp_path, misbehave, trials=5)
    with driver:
        errors = {record.number: record.error or "" for record in driver.records()}
        assert [record.state for record in driver.records()] == ["completed", "failed", "failed", "failed", "completed"]
    assert "fraction" in errors[1] and "TrialOutcome, not dict" in errors[2] and "a library called exit()" in errors[3]


def test_a_killed_process_is_retried_once_from_its_folder(tmp_path: Path) -> None:
    driver, events = run(tmp_path, train_from_checkpoint, trials=3, payload={"deaths": 1})
    with driver:
        record = driver.record(1)
        assert record.state == "completed" and record.extras["starts"] == 2
        assert [entry["fraction"] for entry in record.history] == pytest.approx([0.2, 0.3])
        assert driver.record(2).state == "completed"
        assert len(record.losses) == 1 and driver.record(2).losses == ()
    (retried,) = [event for event in events if event.kind == "retried"]
    assert retried.number == 1 and f"trial 1 was lost on {record.losses[0]} and is run again" in retried.message
    assert record.losses[0].count(".") == 3, "the machine's address"


def test_a_process_that_dies_again_fails_its_trial_and_not_the_study(tmp_path: Path) -> None:
    driver, _ = run(tmp_path, train_from_checkpoint, trials=3, payload={"deaths": 9})
    with driver:
        assert [record.state for record in driver.records()] == ["completed", "failed", "completed"]
        assert "died" in (driver.record(1).error or "")
        assert (driver.trial_directory(1) / "starts").read_text(encoding="ascii") == "xx"


def test_no_trial_begins_that_cannot_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medray.engines.ray import tune

    clock = [1000.0]
    monkeypatch.setattr(tune, "time", SimpleNamespace(time=lambda: clock[0], monotonic=time.monotonic))
    config = StudyConfig(trials=50, pruner="none")

    def suggest(conductor: tune._Conductor, at: float) -> float | None:
        clock[0] = at
        found = conductor.suggest(f"id-{at}")
        return found["task"].seconds if isinstance(found, dict) else None

    with StudyDriver(Space.parse(SPACE), config, {"val/dice": "max"}, tmp_path, DEFAULT) as driver:
        conductor = tune._Conductor(driver, 1, 60.0, 1200.0, lambda: 0.0, lambda _: None)
        assert suggest(conductor, 1000.0) == 60.0
        assert suggest(conductor, 1142.0) == 58.0, "nearly the full length will do"
        assert suggest(conductor, 1146.0) is None
        looking = tune._Conductor(driver, 1, 60.0, 1200.0, lambda: 20.0, lambda _: None)
        assert suggest(looking, 1125.0) is None, "of 75 s 20 go before it trains"
        driver.prune(1)
        driver.report(0, 1, 0.9, {"val/dice": 0.5})
    with StudyDriver(Space.parse(SPACE), config, {"val/dice": "max"}, tmp_path, DEFAULT) as driver:
        conductor = tune._Conductor(driver, 1, 60.0, 1200.0, lambda: 20.0, lambda _: None)
        assert suggest(conductor, 1190.0) == 60.0, "trial 0 goes on from nine tenths"
        assert suggest(conductor, 1190.0) is None, "trial 2 would have to begin anew"
        assert suggest(conductor, 1201.0) is None


def test_running_trials_are_told_at_the_deadline(tmp_path: Path) -> None:
    driver, _ = run(tmp_path, train, trials=2, payload={"sleep": 4.0}, deadline=time.time() + 6.0)
    with driver:
        record = driver.record(0)
        assert (record.state, record.stopped) == ("pruned", "deadline")
        assert len(driver.records()) == 1 and record.metrics == {"val/dice": 0.5}


def test_trials_that_do_not_listen_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medray.engines.ray.tune._GRACE_SECONDS", 1.0)
    began = time.time()
    driver, events = run(tmp_path, never_listen, trials=3, deadline=began + 12.0)
    with driver:
        assert (driver.record(1).state, driver.record(1).stopped) == ("pruned", "deadline")
    assert time.time() < began + 40.0
    assert events[-1].kind == "pruned" and "deadline" in events[-1].message


def test_an_interrupt_ends_cleanly_and_the_trial_comes_again(tmp_path: Path) -> None:
    def interrupt(event: TrialEvent) -> None:
        if event.kind == "progress" and event.number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train, payload={"sleep": 0.3}, on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    driver, events = run(tmp_path, train)
    with driver:
        assert [record.state for record in driver.records()] == ["completed"] * 4
    assert [event.number for event in events if event.kind == "started"] == [1, 2, 3]
