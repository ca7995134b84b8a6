"""The study's entries in MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medray.workflows import diary as module
from medray.workflows.diary import Diary


class Store:
    """A stand-in for MLflow's tracker."""

    runs: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012

    def __init__(self, folder: Path, experiment: str, run: str, **_: Any) -> None:
        self.run_id = run
        self.seen = self.runs.setdefault(run, [])

    def params(self, values: Any) -> None:
        self.seen.append(("params", dict(values)))

    def scalars(self, values: Any, step: int) -> None:
        self.seen.append((f"step {step}", dict(values)))

    def artifact(self, path: Path) -> None:
        self.seen.append(("artifact", path))

    def register(self, name: str, bundle: Path, digest: str) -> str:
        self.seen.append(("register", (name, bundle, digest)))
        return "4"

    def close(self, status: str = "FINISHED") -> None:
        self.seen.append(("close", status))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, Any]]]:
    monkeypatch.setattr(module, "MlflowTracker", Store)
    monkeypatch.setattr(Store, "runs", {})
    return Store.runs


def test_a_trials_curves_are_written_and_then_its_last_figures(runs: Any, tmp_path: Path) -> None:
    rows = [
        {"epoch": 1, "step": 5, "fraction": 0.5, "seconds": 1.0, "lr": 0.1, "loss": 2.0, "val/dice": 0.3},
        {"epoch": 2, "step": 9, "fraction": 1.0, "seconds": 2.0, "lr": 0.2, "loss": 1.0, "val/dice": 0.4},
    ]
    result = tmp_path / "seg" / "trials" / "0003" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"history": rows}), encoding="utf-8")
    notes: list[str] = []
    diary = Diary(tmp_path, "seg", notes.append)
    diary.trial(3, "completed", {"optim.lr": 0.1}, {"val/dice": 0.4, "seconds": 2.0})
    diary.trial(4, "failed", {}, {})
    diary.end({"dice": 0.5})
    assert runs["trial 3"] == [
        ("params", {"optim.lr": 0.1}),
        ("step 5", {"train/mean_loss": 2.0, "train/lr": 0.1, "val/dice": 0.3}),
        ("step 9", {"train/mean_loss": 1.0, "train/lr": 0.2, "val/dice": 0.4}),
        ("step 9", {"val/dice": 0.4, "seconds": 2.0}),
        ("close", "FINISHED"),
    ]
    assert runs["trial 4"] == [("params", {}), ("step 0", {}), ("close", "FAILED")]
    assert runs["seg"][-1] == ("close", "FINISHED") and not notes


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_the_bundle_of_a_study_that_finished_is_registered(runs: Any, tmp_path: Path, status: str) -> None:
    bundle = tmp_path / "seg" / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "bundle.json").write_text("{}", encoding="utf-8")
    (tmp_path / "seg" / "report.html").write_text("report", encoding="utf-8")
    notes: list[str] = []
    Diary(tmp_path, "seg", notes.append).end({}, status=status)
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of two braces
    written = [("artifact", tmp_path / "seg" / "report.html"), ("register", ("seg", bundle, digest))]
    assert runs["seg"][1:-1] == (written if status == "FINISHED" else [])
    assert notes == (["registered as models:/seg@champion, version 4"] if status == "FINISHED" else [])


def test_a_damaged_result_costs_a_note_not_the_study(runs: Any, tmp_path: Path) -> None:
    result = tmp_path / "seg" / "trials" / "0000" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{", encoding="utf-8")
    notes: list[str] = []
    diary = Diary(tmp_path, "seg", notes.append)
    diary.trial(0, "completed", {}, {})
    diary.end({})
    assert len(notes) == 1 and "MLflow takes no entries" in notes[0]
