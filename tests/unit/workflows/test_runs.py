"""The list of runs: every state, also after a kill, from files alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medray.errors import ConfigError, DataError
from medray.workflows.events import StudyEvent
from medray.workflows.runs import RunInfo, list_runs
from medray.workflows.sitting import sitting

STUDY = "study: {name: seg, budget: 120.0, objectives: {val/dice: max}}\n"


def study(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def only(folder: Path) -> RunInfo:
    (found,) = list_runs(folder)
    return found


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_a_study_from_start_to_end(tmp_path: Path) -> None:
    folder = study(tmp_path / "runs" / "seg", clock={"spent": 12.5, "stages": {}})
    with sitting(folder, "study") as told:
        told.measures("val/dice", "max")
        told(StudyEvent(kind="stage", text="searching", elapsed=1, budget=120))
        told(StudyEvent(kind="trial-pruned", trial=0, best=0.4, elapsed=2, budget=120))
        before = snapshot(tmp_path)
        run = only(tmp_path / "runs")
        assert snapshot(tmp_path) == before
        assert (run.name, run.kind, run.state, run.text) == ("seg", "study", "running", "searching")
        assert (run.metric, run.best, run.spent, run.budget) == ("val/dice", 0.4, 12.5, 120.0)
        assert run.trials["pruned"] == 1 and run.changed is not None
        result = {"metric": "dice", "metrics": {"dice": [0.8, 0.7, 0.9]}, "headline": "Dice 0.8", "seconds": 99.0}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    run = only(folder)  # a run's own folder lists that run
    assert (run.state, run.metric, run.best, run.spent, run.text) == ("ended", "dice", 0.8, 99.0, "Dice 0.8")


def test_a_killed_run_is_stopped_at_once(tmp_path: Path) -> None:
    folder = study(tmp_path / "seg")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom medray.workflows.sitting import sitting\n"
        "with sitting(Path(sys.argv[1]), 'study'):\n    print('on', flush=True)\n    time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"on\n"
        assert only(tmp_path).state == "running"
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has taken note of it yet
        assert only(tmp_path).state == "stopped"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert only(tmp_path).state == "stopped"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = study(tmp_path / "seg")
    with pytest.raises(DataError), sitting(folder, "study"):
        raise DataError("no images\nat all")
    assert (only(tmp_path).state, only(tmp_path).text) == ("failed", "DataError: no images at all")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("study.yaml", "study: [", "study.yaml is no YAML"),
        ("study.yaml", "", "study.yaml holds no mapping"),
        ("study.yaml", None, "study.yaml is missing"),
        ("result.json", "{", "result.json is no JSON"),
        ("result.json", "{}", "metric"),
        ("clock.json", "[]", "clock.json holds no object"),
        ("state.json", "\x00", "state.json is no JSON"),
        ("state.json", '{"state": "flying"}', "flying"),
    ],
)
def test_a_damaged_run_is_listed_among_the_others(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    study(tmp_path / "fine", clock={"spent": 1.0})
    folder = study(tmp_path / "bad", clock={"spent": 1.0})
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content, encoding="utf-8")
    runs = {run.name: run for run in list_runs(tmp_path)}
    assert runs["bad"].state == "damaged" and message in runs["bad"].text
    assert set(runs) == {"bad", "fine"} and runs["fine"].state != "damaged"


def test_a_training(tmp_path: Path) -> None:
    folder = tmp_path / "scans-train"
    with sitting(folder, "train") as told:
        told.measures("val/dice", "max")
        assert only(tmp_path).state == "running"  # while it still reads its data
        (folder / "experiment.yaml").write_text("train: {budget: 60.0}\n", encoding="utf-8")
        told(StudyEvent(kind="trial-progress", trial=0, metrics={"val/dice": 0.6}, elapsed=7))
    run = only(tmp_path)
    assert (run.kind, run.metric, run.best, run.budget, dict(run.trials)) == ("train", "val/dice", 0.6, 60.0, {})
    result = {"best": {"val/dice": 0.7}, "seconds": 9.0, "stopped": "early", "epochs": 4}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    run = only(tmp_path)
    assert (run.state, run.best, run.spent, run.text) == ("ended", 0.7, 9.0, "early after epoch 4")


def test_runs_of_an_earlier_version_and_folders_that_are_none(tmp_path: Path) -> None:
    folder = study(tmp_path / "old")
    for number, (value, stopped) in enumerate([(0.4, "finished"), (0.6, "early"), (0.5, "pruned")]):
        trial = folder / "trials" / f"{number:04}"
        trial.mkdir(parents=True)
        (trial / "result.json").write_text(json.dumps({"best": {"val/dice": value}, "stopped": stopped}))
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "experiment.yaml").write_text("data: x\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlflow.db").touch()
    run = only(tmp_path)
    assert (run.name, run.state, run.best, run.metric) == ("old", "stopped", 0.6, "val/dice")
    assert run.trials == {"completed": 2, "pruned": 1}
    (folder / "clock.json").write_text('{"spent": 3.0}')
    assert only(tmp_path).state == "running"  # its clock was written just now
    os.utime(folder / "clock.json", (1e9, 1e9))
    assert only(tmp_path).state == "stopped"


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        list_runs(tmp_path / "none")
    assert list_runs(tmp_path) == []
