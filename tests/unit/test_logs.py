"""Structured logs: what a line holds, how workers' lines are merged, and what a broken disk costs."""

from __future__ import annotations

import json
import logging
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray import logs

log = logging.getLogger("medray.somewhere")

WORKER = """
import logging, os, pickle, signal, sys
from medray import logs
logs.join(pickle.loads(bytes.fromhex(sys.argv[1])), trial=int(sys.argv[2]))
logging.getLogger("medray.train").info("step %d", 7, extra={"seconds": 0.5})
logging.getLogger("medray.train").debug("too fine")
logging.getLogger("third.party").info("too fine as well")
if "die" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("medray.train").exception("failed")
"""


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():  # the first line makes it
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def worker(destination: logs.Destination | None, trial: int, *words: str) -> None:
    subprocess.run([sys.executable, "-c", WORKER, pickle.dumps(destination).hex(), str(trial), *words], timeout=60)


def test_a_line_is_one_json_object_with_time_level_event_and_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A lone surrogate, as in a file's name that is no UTF-8: pytest would keep it, and can't send it from its workers.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with logs.recording(tmp_path, run="seg"):
        logs.event(
            "trial-completed",
            trial=3,
            text="two\nlines",
            metrics={"val/dice": np.float32(0.5), "val/loss": math.nan},
            best=None,
        )
        log.warning("hello %s", "Ärzte \udce4", extra={"where": Path("x")})
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and "NaN" not in lines[0]
    event, said = (json.loads(line) for line in lines)
    assert event.pop("time").endswith("Z")
    assert list(event)[:3] == ["level", "event", "run"]
    assert event == {
        "level": "info", "event": "trial-completed", "run": "seg", "trial": 3, "text": "two\nlines",
        "metrics": {"val/dice": 0.5, "val/loss": None},
    }  # fmt: skip
    assert (said["level"], said["event"], said["logger"], said["where"]) == (
        "warning", "hello Ärzte \udce4", "medray.somewhere", "x",
    )  # fmt: skip


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers), logging.getLogger("medray").level
    with logs.configured("json"), logs.recording(tmp_path, run="seg"):
        assert logs.is_json() and logs.destination() is not None
    assert (list(logging.getLogger().handlers), logging.getLogger("medray").level) == before
    assert logs.destination() is None and not logs.is_json()
    logs.event("after")
    log.warning("after")
    assert not (tmp_path / "log.jsonl").exists()


def test_workers_are_merged_and_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logs.configured("json"), logs.recording(tmp_path, run="seg"):
        for trial in (4, 5):
            worker(logs.destination(), trial)
        deadline = time.monotonic() + 20
        while len(rows(tmp_path / "log.jsonl")) < 4 and time.monotonic() < deadline:  # while the run goes on
            time.sleep(0.05)
    found = rows(tmp_path / "log.jsonl")
    assert [(row["trial"], row["event"]) for row in found] == [
        (4, "step 7"),
        (4, "failed"),
        (5, "step 7"),
        (5, "failed"),
    ]
    assert all(row["run"] == "seg" and row["worker"] for row in found) and found[0]["seconds"] == 0.5
    assert found[0]["worker"] != found[2]["worker"]
    assert found[1]["exception"].endswith("ZeroDivisionError: division by zero")
    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == found
    assert not (tmp_path / logs.INBOX).exists()


def test_lines_of_a_killed_run_are_merged_by_the_next_and_none_twice(tmp_path: Path) -> None:
    with logs.recording(tmp_path, run="seg"):
        where = logs.destination()
        logs.event("first")
    assert where is not None
    worker(where, 1, "die")
    (left,) = (tmp_path / logs.INBOX).iterdir()
    merged_already = left.read_bytes()
    with (tmp_path / "log.jsonl").open("ab") as file:  # a kill between merging and removing
        file.write(merged_already)
    worker(where, 2)
    with left.open("ab") as file:
        file.write(b'{"half a line of')
    with logs.recording(tmp_path, run="seg"):
        logs.event("second")
    found = [(row.get("trial"), row["event"]) for row in rows(tmp_path / "log.jsonl")]
    assert sorted(found, key=str) == sorted(
        [(None, "first"), (1, "step 7"), (2, "step 7"), (2, "failed"), (None, "second")], key=str
    )


def test_a_worker_moves_from_trial_to_trial_and_from_run_to_run(tmp_path: Path) -> None:
    def go(name: str, trial: int) -> None:
        logs.join(
            logs.Destination(directory=str(tmp_path / name), level=logging.INFO, labels={"run": name}), trial=trial
        )
        log.info("here")

    level = logging.getLogger("medray").level
    try:
        go("a", 1)
        go("a", 2)
        go("b", 3)
        handed = logs.destination()
        assert handed is not None and dict(handed.labels) == {"run": "b", "trial": 3}
    finally:
        logs.join(None)
        logging.getLogger("medray").setLevel(level)
    log.warning("nowhere")
    found = {name: list((tmp_path / name / logs.INBOX).iterdir()) for name in ("a", "b")}
    assert all(len(files) == 1 for files in found.values())
    assert [(row["run"], row["trial"]) for row in rows(found["a"][0])] == [("a", 1), ("a", 2)]
    assert [(row["run"], row["trial"]) for row in rows(found["b"][0])] == [("b", 3)]


def test_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logs.configured("json", "error"), logs.recording(tmp_path, run="x"):
        log.info("info")
        log.error("error")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["error"]
    assert [row["event"] for row in rows(tmp_path / "log.jsonl")] == ["info", "error"]
    with logs.configured("json", "debug"), logs.recording(tmp_path / "fine", run="x"):
        log.debug("fine")
    assert [row["event"] for row in rows(tmp_path / "fine" / "log.jsonl")] == ["fine"]


def test_as_text_only_warnings_are_shown_and_events_are_left_to_the_view(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logs.configured(), logs.recording(tmp_path, run="x"):
        logs.bind(trial=2)
        logs.event("trial-failed", level="warning")
        log.info("fine")
        log.warning("the micro-batch is halved")
    assert capsys.readouterr().err == "warning: trial 2: the micro-batch is halved\n"


def test_a_log_that_cannot_be_written_costs_one_warning_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with logs.recording(tmp_path, run="x"):
        logs.event("one")
        logs.event("two")
    assert capsys.readouterr().err.count("takes no more lines") == 1


def test_a_programme_that_configured_nothing_still_sees_warnings(tmp_path: Path) -> None:
    script = (
        "import logging, sys\nfrom pathlib import Path\nfrom medray import logs\n"
        "with logs.recording(Path(sys.argv[1]), run='x'):\n"
        "    logging.getLogger('medray.train').warning('the micro-batch is halved')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stderr == "warning: the micro-batch is halved\n"
    assert [row["event"] for row in rows(tmp_path / "log.jsonl")] == ["the micro-batch is halved"]
