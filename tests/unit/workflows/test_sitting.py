"""What a run leaves of itself while it goes on: the state file and the log."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from medray.errors import DataError, StudyError
from medray.workflows import sitting as module
from medray.workflows.events import StudyEvent
from medray.workflows.sitting import STATE, is_alive, sitting


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_studys_events_reach_observer_log_and_state(tmp_path: Path) -> None:
    heard: list[StudyEvent] = []
    with sitting(tmp_path / "seg", "study", observer=heard.append) as told:
        told.measures("val/dice", "max")
        told(StudyEvent(kind="stage", text="searching", elapsed=1, budget=60))
        told(StudyEvent(kind="trial-started", trial=0, elapsed=2))
        told(StudyEvent(kind="trial-started", trial=1, elapsed=2))
        told(StudyEvent(kind="trial-completed", trial=0, metrics={"val/dice": 0.7}, best=0.7, elapsed=9, budget=60))
        now = state(tmp_path / "seg")
        assert (now["state"], now["pid"], now["stage"]) == ("running", os.getpid(), "searching")
        assert now["trials"] == {"completed": 1, "pruned": 0, "failed": 0, "running": 1}
        assert (now["metric"], now["best"], now["elapsed"], now["budget"]) == ("val/dice", 0.7, 9, 60)
    assert [event.kind for event in heard] == ["stage", "trial-started", "trial-started", "trial-completed"]
    end = state(tmp_path / "seg")
    assert end["state"] == "ended" and end["trials"]["running"] == 0
    rows = log(tmp_path / "seg")
    assert [row["event"] for row in rows] == ["run-started", *(event.kind for event in heard), "run-ended"]
    assert all(row["run"] == "seg" for row in rows) and rows[4]["trial"] == 0 and rows[4]["best"] == 0.7


def test_a_second_sitting_goes_on_counting(tmp_path: Path) -> None:
    for number in range(2):
        with sitting(tmp_path, "study") as told:
            told(StudyEvent(kind="trial-completed", trial=number, best=0.5 + number / 10, elapsed=1))
    assert state(tmp_path)["trials"]["completed"] == 2
    with sitting(tmp_path, "study"):
        assert state(tmp_path)["best"] == 0.6


def test_a_trainings_best_follows_its_metric_and_direction(tmp_path: Path) -> None:
    with sitting(tmp_path, "train") as told:
        told.measures("val/loss", "min")
        for value in (0.5, 0.3, float("nan"), 0.4):
            told(StudyEvent(kind="trial-progress", trial=0, metrics={"val/loss": value}, elapsed=1))
    assert state(tmp_path)["best"] == 0.3
    assert all("trial" not in row for row in log(tmp_path))


@pytest.mark.parametrize(
    ("error", "found", "event"),
    [(DataError("no images"), "failed", "run-failed"), (KeyboardInterrupt(), "stopped", "run-stopped")],
)
def test_how_it_ended_is_told(tmp_path: Path, error: BaseException, found: str, event: str) -> None:
    with pytest.raises(type(error)), sitting(tmp_path, "study"):
        raise error
    assert state(tmp_path)["state"] == found and log(tmp_path)[-1]["event"] == event
    if found == "failed":
        assert state(tmp_path)["error"] == "DataError: no images"
        assert "no images" in log(tmp_path)[-1]["exception"]


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    with sitting(tmp_path, "study"):
        with pytest.raises(StudyError, match=f"another process .id {os.getpid()}"), sitting(tmp_path, "study"):
            pass
        assert state(tmp_path)["state"] == "running"
    with sitting(tmp_path, "study"):
        pass


def test_who_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"place": module._place(), "pid": os.getpid(), "born": module._born(os.getpid())}
    assert is_alive(mine, silence=1e6)  # the system knows; the file's age doesn't matter
    assert not is_alive({**mine, "born": "1"}, silence=0)  # the number went to another process
    assert not is_alive({**mine, "pid": 2**22 + 1, "born": "1"}, silence=0)
    far = {**mine, "place": "another/boot/pid:[1]"}
    assert is_alive(far, silence=20) and not is_alive(far, silence=200)
    assert not is_alive({"place": module._place()}, silence=0)


def test_the_state_is_renewed_without_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    with sitting(tmp_path, "study"):
        first = (tmp_path / STATE).stat().st_ino
        seen = {first}
        for _ in range(500):
            if len(seen) > 1:
                break
            module.time.sleep(0.01)
            seen.add((tmp_path / STATE).stat().st_ino)
        assert len(seen) > 1, "the state file was not written anew"
