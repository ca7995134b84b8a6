"""The installed program, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MEDRAY = [sys.executable, "-m", "medray"]


def test_help_answers_in_half_a_second() -> None:
    times = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run([*MEDRAY, "--help"], capture_output=True, text=True, timeout=60)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and "tune" in done.stdout
    # One thread that waits for nothing: its CPU time is its wall time, without what else the machine was doing.
    assert min(times) < 0.5, times


def test_an_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run([*MEDRAY, "check", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere") and "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*MEDRAY, "data", "list"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=120)
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_doctor_finds_this_machine_ready(tmp_path: Path) -> None:
    done = subprocess.run([*MEDRAY, "doctor"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "CPU bf16" in done.stdout and "ray" in done.stdout and done.stdout.rstrip().endswith("ready")


def test_check_and_plan_write_files_that_read_back(tmp_path: Path) -> None:
    data = "phantom://ct-lesions?cases=8&size=16"
    for words in (["check", data], ["plan", data, "--budget", "20s"]):
        done = subprocess.run([*MEDRAY, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "ct-lesions"
    from medray.config.compose import build_experiment, compose
    from medray.data.manifest import Manifest

    assert len(Manifest.load(folder / "manifest.json").cases) == 8
    experiment = build_experiment(compose(folder / "experiment.yaml").explicit)
    assert experiment.data == data and experiment.train.budget == 20
