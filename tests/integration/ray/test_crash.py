"""The process that drives a study is killed; the study goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.crash import Kill, torment
from medray.config.schema import StudyConfig
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import TrialOutcome, TrialRecord

SCRIPT = Path(__file__).with_name("study_process.py")
SPACE = {"optim.lr": {"float": [1e-4, 1e-2], "log": True}, "model.name": {"choice": ["unet", "swin"]}}
TRIALS = 7


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(folder), str(TRIALS), str(seconds)]
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )


def wait_for(process: subprocess.Popen[str], wanted: Callable[[list[Any]], bool]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[") and wanted(json.loads(line)):
            return
    pytest.fail("the study ended before that happened")


def open_study(folder: Path) -> StudyDriver:
    config = StudyConfig(trials=TRIALS, pruner="none")
    return StudyDriver(Space.parse(SPACE), config, {"val/dice": "max"}, folder, {"optim.lr": 0.5})


def uninterrupted(folder: Path) -> list[TrialRecord]:
    """The same study without Ray and without any kill."""
    with open_study(folder) as driver:
        while (task := driver.ask()) is not None:
            driver.report(task.number, 9, 1.0, {"val/dice": task.params["optim.lr"]})
            driver.complete(task.number, TrialOutcome(metrics={"val/dice": task.params["optim.lr"]}))
        return driver.records()


def epochs(folder: Path, number: int) -> list[tuple[int, int]]:
    lines = (folder / "trials" / f"{number:04d}" / "epochs.txt").read_text(encoding="ascii").splitlines()
    return [(int(epoch), int(pid)) for epoch, pid in map(str.split, lines)]


@pytest.mark.timeout(300)
def test_a_killed_driver_loses_nothing_and_goes_on_as_it_would_have(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    process = start(folder, seconds=2.0)
    wait_for(process, lambda event: event[0] == "progress" and event[1] == 5 and event[2] > 0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()

    # The worker must not go on training in a folder that the resumed study will hand out again.
    worker = epochs(folder, 5)[-1][1]
    deadline = time.monotonic() + 30
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
                break
        time.sleep(0.1)
    assert time.monotonic() < deadline, "the worker outlived its study"

    with open_study(folder) as driver:
        assert [record.state for record in driver.records()] == ["completed"] * 5 + ["running"]

    process = start(folder, seconds=0.0)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    started = [event[1] for event in map(json.loads, output.splitlines()) if event[0] == "started"]
    assert started == [5, 6], "finished trials are not run again"
    with open_study(folder) as driver:
        records = driver.records()
    assert [(r.number, r.params, r.values) for r in records] == [
        (r.number, r.params, r.values) for r in uninterrupted(tmp_path / "whole")
    ]
    resumed = records[5]
    assert resumed.extras["resumed_at"] >= 4
    assert [epoch for epoch, _ in epochs(folder, 5)] == list(range(1, 10)), "each epoch was trained once"


@pytest.mark.timeout(300)
def test_ctrl_c_leaves_a_study_that_can_be_resumed(tmp_path: Path) -> None:
    process = start(tmp_path, seconds=1.0)
    wait_for(process, lambda event: event[0] == "progress" and event[1] == 1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (1, 130, -signal.SIGINT) and time.monotonic() - began < 30
    with open_study(tmp_path) as driver:
        assert [record.state for record in driver.records()] == ["completed", "running"]
        task = driver.ask()
        assert task is not None and task.number == 1


@pytest.mark.timeout(300)
def test_the_command_line_loses_nothing_to_kills_of_driver_and_trial(tmp_path: Path) -> None:
    # The driver dies with one trial finished and others in flight; in the resumed study a trial's process does.
    kills = [Kill(victim="driver", after=0.0, finished=1), Kill(victim="trial", after=0.0, finished=1)]
    account = torment(tmp_path, kills, trials=4, epochs=2)
    assert account.kills == {"trial": 1, "driver": 1, "head": 0} and account.resumed == 1
    losses = (account.lost, account.renumbered, account.failed, account.unusable)
    assert losses == (0, 0, 0, 0), "\n".join(account.notes)
