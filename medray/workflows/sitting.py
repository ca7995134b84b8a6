"""A run's sitting: one process that works on a run, from its start to its end, however that comes.

It leaves ``state.json`` (what ``medray runs`` reads) and ``log.jsonl``. A process that is killed can't say so: the file
names the process, with the time it was started at, and is renewed every few seconds, so that a reader can tell.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from medray import logs
from medray.errors import StudyError
from medray.workflows.events import Observer, StudyEvent

__all__ = ["BEAT", "STATE", "Sitting", "State", "disown", "is_alive", "sitting"]

State = Literal["running", "ended", "stopped", "failed", "damaged"]
STATE = "state.json"
BEAT = 5.0
"""Seconds between renewals of ``state.json``."""
SILENCE = 90.0
"""Seconds without one after which a process of another machine counts as dead; network drives show changes late."""

_ENDS = {"trial-completed": "completed", "trial-pruned": "pruned", "trial-failed": "failed"}


class Sitting:
    """Hears a run's events: writes them to the log, sums them up in ``state.json``, and passes them on."""

    def __init__(self, directory: Path, kind: Literal["study", "train"], observer: Observer | None) -> None:
        self.directory = directory
        self._observer = observer
        self._lock = threading.Lock()
        earlier = _read(directory / STATE)
        trials = {name: int(number) for name, number in (earlier.get("trials") or {}).items() if name != "running"}
        self._running: set[int] = set()
        self._better: Callable[[float, float], float] = max
        self._summary: dict[str, Any] = {
            "kind": kind,
            "state": "running",
            "place": _place(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "since": _now(),
            "stage": "",
            "metric": earlier.get("metric"),
            "best": earlier.get("best"),
            "elapsed": earlier.get("elapsed"),
            "budget": None,
            "trials": {**dict.fromkeys(_ENDS.values(), 0), **trials, "running": 0},
            "error": None,
        }
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="medray-state", daemon=True)

    def measures(self, metric: str, direction: Literal["max", "min"]) -> None:
        """Name the figure that ``best`` is of, and which way is better."""
        with self._lock:
            self._summary["metric"] = metric
            self._better = max if direction == "max" else min

    def __call__(self, event: StudyEvent) -> None:
        self._log(event)
        with self._lock:
            self._sum_up(event)
        if event.kind in _ENDS or event.kind == "stage":
            self._save()
        if self._observer is not None:
            self._observer(event)

    def start(self) -> None:
        self._save()
        self._thread.start()

    def end(self, state: State, error: BaseException | None = None) -> None:
        """The last word."""
        self._over.set()
        self._thread.join()
        with self._lock:
            self._summary["state"] = state
            self._summary["trials"]["running"] = 0
            if error is not None:
                self._summary["error"] = f"{type(error).__name__}: {error}"[:2000]
        self._save()

    def _log(self, event: StudyEvent) -> None:
        logs.event(
            event.kind,
            level="warning" if event.kind == "trial-failed" else "info",
            text=event.text or None,
            trial=event.trial if self._summary["kind"] == "study" else None,
            fraction=event.fraction,
            metrics=dict(event.metrics) or None,
            best=event.best,
            elapsed=round(event.elapsed, 3),
            budget=event.budget,
            expected_gain=event.expected_gain,
        )

    def _sum_up(self, event: StudyEvent) -> None:
        summary = self._summary
        if event.kind == "stage":
            summary["stage"] = event.text
        best = event.best
        if summary["kind"] == "train":  # its validations are all there is
            best = event.metrics.get(summary["metric"] or "")
            known = summary["best"]
            if best is not None and known is not None and math.isfinite(best):
                best = self._better(best, known)
        if best is not None and math.isfinite(best):
            summary["best"] = best
        if event.elapsed:
            summary["elapsed"] = event.elapsed
        summary["budget"] = event.budget if event.budget is not None else summary["budget"]
        if event.trial is not None and summary["kind"] == "study":
            if event.kind in _ENDS:
                self._running.discard(event.trial)
                summary["trials"][_ENDS[event.kind]] += 1
            elif event.kind in ("trial-started", "trial-progress"):
                self._running.add(event.trial)
            summary["trials"]["running"] = len(self._running)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._save()

    def _save(self) -> None:
        path = self.directory / STATE
        partial = path.with_name(f"{STATE}.part")
        with self._lock, contextlib.suppress(OSError):  # a full disk costs the listing, not the run
            partial.write_text(json.dumps(self._summary, indent=1, allow_nan=False), encoding="utf-8")
            partial.replace(path)


@contextlib.contextmanager
def sitting(directory: Path, kind: Literal["study", "train"], *, observer: Observer | None = None) -> Iterator[Sitting]:
    """Work on the run in ``directory``, for the length of the block.

    Args:
        directory: of the run.
        kind: of the run.
        observer: told all events after the log.

    Raises:
        StudyError: another process of this machine works on it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    former = _read(directory / STATE)
    if former.get("state") == "running" and former.get("place") == _place() and is_alive(former, 0.0):
        raise StudyError(
            f"{directory} is being run by another process (id {former.get('pid')}); wait for it or stop it, "
            "then try again"
        )
    own = Sitting(directory, kind, observer)
    own.start()
    with logs.recording(directory, run=directory.absolute().name):
        logs.event("run-started", kind=kind, pid=os.getpid(), host=socket.gethostname())
        try:
            yield own
        except KeyboardInterrupt:
            own.end("stopped")
            logs.event("run-stopped", level="warning")
            raise
        except BaseException as error:
            own.end("failed", error)
            logs.event("run-failed", level="error", text=str(error), error=type(error).__name__, exc_info=error)
            raise
        own.end("ended")
        logs.event("run-ended")


def disown(directory: Path) -> None:
    """Say of a copy of a run that nobody works on it: what its state file names is at work on the original, or was."""
    stored = _read(directory / STATE)
    if stored.get("state") == "running":
        (directory / STATE).write_text(json.dumps({**stored, "state": "stopped"}, indent=1), encoding="utf-8")


def is_alive(state: dict[str, Any], silence: float) -> bool:
    """Whether the process that wrote a ``state.json`` lives.

    On the same machine that is asked of the system: right at once, also after ``kill -9``, and where its number has
    been given to another process. Of another machine, or container, the renewals of the file tell.

    Args:
        state: the file's content.
        silence: seconds since the file was renewed.
    """
    if state.get("place") != _place():
        return silence < SILENCE
    try:
        pid, born = int(state["pid"]), state["born"]
    except (KeyError, TypeError, ValueError):
        return False
    return _born(pid) == born if born is not None else _exists(pid)


def _place() -> str:
    """Where process numbers mean the same: this boot of this machine, this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return "/".join(parts)


def _born(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks since boot; None where it is none, a zombie, or no Linux."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold spaces and parentheses; 3rd: state, 22nd: start
    return None if len(fields) < 20 or fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now() -> str:
    return dt.datetime.fromtimestamp(time.time(), dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _read(path: Path) -> dict[str, Any]:
    """A state file; nothing where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return stored
    return {}
