"""The study's entries in MLflow: a run for the study, one nested in it for each trial, and its bundle in the registry.

Written by a thread of the driver, behind a queue: opening the store takes seconds, and no trial waits for it. A store
that can't be written costs a note, never the study: the study's own folder is the record.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medray.bundle.files import sha256
from medray.bundle.spec import MANIFEST_NAME
from medray.tracking import CHAMPION, MlflowTracker

PATIENCE = 60.0
"""Seconds that the end of a study waits for entries still in the queue, and for the copy of its bundle."""

Note = Callable[[str], None]


class Diary:
    """Writes to ``<folder>/mlflow.db``.

    Args:
        folder: where the runs lie.
        study: the name of its folder there, which is the MLflow experiment's.
        note: told, once, where the store can't be written.
    """

    def __init__(self, folder: Path, study: str, note: Note) -> None:
        self._folder, self._study, self._note = folder, study, note
        self._parent: MlflowTracker | None = None
        self._entries: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="medray-diary", daemon=True)
        self._thread.start()

    def study(self, params: Mapping[str, Any]) -> None:
        """What was asked for."""
        self._entries.put(lambda: self._open().params(params))

    def trial(self, number: int, state: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A trial that has ended; its curves are taken from its ``result.json``, where it has come to one."""
        params, metrics = dict(params), dict(metrics)

        def write() -> None:
            parent = self._open()
            tracker = MlflowTracker(
                self._folder, self._study, f"trial {number}", parent=parent.run_id, tags={"medray.state": state}
            )
            tracker.params(params)
            step = 0
            for step, row in _curves(self._folder / self._study / "trials" / f"{number:04d}" / "result.json"):
                tracker.scalars(row, step)
            tracker.scalars(metrics, step)
            tracker.close("FAILED" if state == "failed" else "FINISHED")

        self._entries.put(write)

    def end(self, metrics: Mapping[str, float], *, status: str = "FINISHED") -> None:
        """Close the study's run, and wait a little for what is still to be written.

        Of a study that finished the report goes with it, and the bundle into the registry, as a new version of a model
        with the study's name: a copy, so that it stays what it is when the study goes on.
        """
        metrics, place = dict(metrics), self._folder / self._study

        def write() -> None:
            parent = self._open()
            parent.scalars(metrics, 0)
            if status == "FINISHED" and (place / "report.html").is_file():
                parent.artifact(place / "report.html")
            if status == "FINISHED" and (place / "bundle" / MANIFEST_NAME).is_file():
                digest = sha256(place / "bundle" / MANIFEST_NAME)
                version = parent.register(self._study, place / "bundle", digest)
                self._note(f"registered as models:/{self._study}@{CHAMPION}, version {version}")
            parent.close(status)

        self._entries.put(write)
        self._entries.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._note(f"MLflow was not done {PATIENCE:.0f} s after the study's end; entries may be missing there")

    def _open(self) -> MlflowTracker:
        if self._parent is None:
            self._parent = MlflowTracker(self._folder, self._study, self._study)
        return self._parent

    def _write(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # where the system knows no priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        while (entry := self._entries.get()) is not None:
            try:
                entry()
            except Exception as error:  # whatever MLflow or its database raise: the study goes on
                self._note(f"MLflow takes no entries ({error}); the study's folder has everything")
                return


def _curves(result: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(optimiser step, figures) of each validation in a trial's ``result.json``."""
    if not result.is_file():
        return
    for row in json.loads(result.read_text(encoding="utf-8"))["history"]:
        figures = {name: float(row[name]) for name in row if name.startswith("val/")}
        yield int(row["step"]), {"train/mean_loss": float(row["loss"]), "train/lr": float(row["lr"]), **figures}
