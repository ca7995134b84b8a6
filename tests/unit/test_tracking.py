"""Every tracker passes one contract; what the vendors store is read back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medray.tracking import MlflowTracker, NullTracker, TensorBoardTracker, Tracker, Trackers, flatten


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def params(self, values: object) -> None:
        self.calls.append(("params", values))

    def scalars(self, values: object, step: int) -> None:
        self.calls.append(("scalars", step))

    def picture(self, name: str, picture: object, step: int = 0) -> None:
        self.calls.append(("picture", name))

    def artifact(self, path: Path) -> None:
        self.calls.append(("artifact", path))

    def close(self) -> None:
        self.calls.append(("close", None))


MAKERS: dict[str, Callable[[Path], Tracker]] = {
    "null": lambda folder: NullTracker(),
    "several": lambda folder: Trackers([Recorder(), NullTracker()]),
    "tensorboard": lambda folder: TensorBoardTracker(folder / "events"),
    "mlflow": lambda folder: MlflowTracker(folder / "runs", "study", "trial 0"),
}


def tell(tracker: Tracker, folder: Path) -> None:
    tracker.params({"optim": {"lr": 1e-3}, "data": "a|b", "long": "x" * 9000})
    tracker.scalars({"val/dice": 0.5, "loss": float("nan")}, step=1)
    tracker.scalars({"val/dice": 0.75}, step=2)
    tracker.picture("overlay", np.zeros((8, 6, 3), np.uint8), step=2)
    tracker.picture("mask", np.zeros((8, 6), np.uint8))
    (folder / "note.txt").write_text("kept", encoding="utf-8")
    tracker.artifact(folder / "note.txt")
    tracker.close()
    tracker.close()


@pytest.mark.parametrize("name", MAKERS)
def test_contract(name: str, tmp_path: Path) -> None:
    tell(MAKERS[name](tmp_path), tmp_path)
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "kept", "what is kept elsewhere stays here"


def test_mlflow_store_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "Läufe (neu)"
    parent = MlflowTracker(folder, "study", "study")
    tracker = MlflowTracker(folder, "study", "trial 0", parent=parent.run_id, tags={"stage": "search"})
    tell(tracker, tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run(tracker.run_id)
    assert run.data.params["optim.lr"] == "0.001" and len(run.data.params["long"]) == 6000
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "val/dice")] == [(1, 0.5), (2, 0.75)]
    assert "loss" not in run.data.metrics
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert {item.path for item in client.list_artifacts(tracker.run_id)} == {"note.txt", "pictures"}


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    tell(TensorBoardTracker(tmp_path / "events"), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/dice")] == [(1, 0.5), (2, 0.75)]
    assert "overlay" in events.Tags()["images"]


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Recorder):
        def scalars(self, values: object, step: int) -> None:
            raise OSError("no space left on device")

    recorder, full = Recorder(), Full()
    trackers = Trackers([full, recorder])
    with caplog.at_level(logging.WARNING):
        trackers.scalars({"loss": 1.0}, 1)
        trackers.scalars({"loss": 1.0}, 2)
        trackers.close()
    assert recorder.calls == [("scalars", 1), ("scalars", 2), ("close", None)] and full.calls == []
    assert caplog.text.count("no space left on device") == 1


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}
