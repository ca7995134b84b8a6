"""Structured logs: one JSON object a line, of what a run does and of what its workers say.

    {"time": "2026-11-20T17:40:28.123456Z", "level": "info", "event": "trial-completed", "run": "seg", "trial": 3, ...}

Modules log through :mod:`logging`; a run's events are told by :func:`event`. The command line configures its process
(:func:`configured`), a run records itself in ``log.jsonl`` of its folder (:func:`recording`), and a process that an
engine starts joins it (:func:`join`). Such a process writes to a file of its own, which the recording process merges:
several machines that append to one file on a network drive would overwrite each other's lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

__all__ = [
    "LEVELS",
    "Destination",
    "Format",
    "bind",
    "configured",
    "destination",
    "event",
    "is_json",
    "join",
    "recording",
]

Format = Literal["json", "text"]
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
FILE = "log.jsonl"
INBOX = ".logs"
"""Folder within a run's, in which each worker process has its file until it is merged."""
POLL = 0.5
"""Seconds between looks at the workers' files."""
_FIRST = ("time", "level", "event", "run", "trial", "worker")
_PLAIN_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a worker's lines go; engines hand it, pickled, to the processes that they start.

    Attributes:
        directory: the run's folder, which the worker's machine sees too.
        level: number below which nothing is written.
        labels: of every line.
    """

    directory: str
    level: int
    labels: Mapping[str, Any]


class _Sink(Protocol):
    level: int

    def take(self, row: Row, line: str) -> None: ...


_lock = threading.RLock()
_sinks: list[_Sink] = []
_labels: dict[str, Any] = {}
_destination: Destination | None = None


# Telling -------------------------------------------------------------------------------------------------------------


def event(name: str, *, level: str = "info", exc_info: BaseException | None = None, **fields: Any) -> None:
    """Tell that something happened: one line wherever this process logs to, nothing where it doesn't.

    Args:
        name: of the event, such as ``trial-completed``.
        level: a key of :data:`LEVELS`.
        exc_info: an exception, whose traceback becomes the field ``exception``.
        fields: JSON values; None is left out, a number that is not finite becomes null.
    """
    if _sinks:
        _emit({"event": name, "level": level, "exc_info": exc_info, **fields})


def bind(**labels: Any) -> None:
    """Put these on every line of this process from now on; None takes one away."""
    with _lock:
        _labels.update(labels)
        for name in [name for name, value in _labels.items() if value is None]:
            del _labels[name]


def is_json() -> bool:
    """Whether this process was told to write JSON to stderr."""
    return any(isinstance(sink, _Stderr) and sink.form == "json" for sink in _sinks)


@cache
def _processors() -> tuple[Callable[[Any, str, Any], Any], ...]:
    from structlog.processors import TimeStamper, format_exc_info

    return TimeStamper(fmt="iso", utc=True, key="time"), format_exc_info


def _emit(fields: dict[str, Any]) -> None:
    with _lock:
        row = {**_labels, **{name: value for name, value in fields.items() if value is not None}}
        for processor in _processors():
            row = processor(None, "", row)
        row = {name: _plain(row[name]) for name in (*_FIRST, *row) if name in row}
        _give(row, json.dumps(row, default=str, allow_nan=False))


def _give(row: Row, line: str) -> None:
    severity = LEVELS.get(str(row.get("level")), logging.INFO)
    for sink in tuple(_sinks):
        if severity >= sink.level:
            sink.take(row, line)


def _plain(value: Any) -> Any:
    """For JSON; NaN and infinities, which JSON doesn't know and log stores refuse, become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if not isinstance(value, float) and hasattr(value, "item") and getattr(value, "size", 1) == 1:  # NumPy, torch
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, int) else str(value)


class _Bridge(logging.Handler):
    """What modules and libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            extra = {name: value for name, value in vars(record).items() if name not in _PLAIN_RECORD}
            level = record.levelname.lower()
            _emit(
                {
                    **extra,
                    "event": record.getMessage(),
                    "level": level if level in LEVELS else "info",
                    "logger": record.name,
                    "exc_info": record.exc_info if record.exc_info and record.exc_info[0] else None,
                }
            )
        except Exception:
            self.handleError(record)


_bridge = _Bridge()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that isn't in the child may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _add(sink: _Sink) -> None:
    with _lock:
        _sinks.append(sink)
        root = logging.getLogger()
        if _bridge not in root.handlers:
            root.addHandler(_bridge)


def _remove(sink: _Sink) -> None:
    with _lock:
        if sink in _sinks:
            _sinks.remove(sink)
        if not _sinks:
            logging.getLogger().removeHandler(_bridge)


# Where lines go ------------------------------------------------------------------------------------------------------


class _File:
    """Lines appended to a file, made with the first of them; each is one write, whole even after a kill."""

    def __init__(self, path: Path, level: int) -> None:
        self.path, self.level = path, level
        self._descriptor: int | None = None
        self._broken = False

    def take(self, row: Row, line: str) -> None:  # noqa: ARG002
        if self._broken:
            return
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            os.write(self._descriptor, line.encode() + b"\n")
        except OSError as error:  # a full disk costs the log, not the run
            self._broken = True
            with contextlib.suppress(OSError, ValueError):
                print(f"warning: {self.path} takes no more lines ({error})", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Stderr:
    """JSON lines for programs, or what modules logged as text; a run's events have a view of their own there."""

    def __init__(self, form: Format, level: int) -> None:
        self.form, self.level = form, level

    def take(self, row: Row, line: str) -> None:
        if self.form == "text":
            foreign = "worker" in row and not str(row.get("logger", "")).startswith("medray")
            if "logger" not in row or foreign:
                return
            line = _as_text(row)
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def _as_text(row: Row) -> str:
    about = "".join(f"{name} {row[name]}: " for name in ("trial", "final") if name in row)
    trace = f"\n{row['exception']}" if row.get("exception") else ""
    return f"{row['level']}: {about}{row['event']}{trace}"


@contextlib.contextmanager
def configured(form: Format = "text", level: str | None = None) -> Iterator[None]:
    """Have this process write to stderr.

    Args:
        form: ``json`` for one object a line; ``text`` for warnings as they have always looked.
        level: least level shown, a key of :data:`LEVELS`; None: info as JSON, warnings as text.
    """
    severity = LEVELS[level or ("info" if form == "json" else "warning")]
    ours = logging.getLogger("medray")
    before = ours.level
    ours.setLevel(min(severity, logging.INFO))  # the file of a run holds at least that
    sink = _Stderr(form, severity)
    _add(sink)
    if form == "json":
        logging.captureWarnings(True)
    try:
        yield
    finally:
        if form == "json":
            logging.captureWarnings(False)
        _remove(sink)
        ours.setLevel(before)


# A run and its workers -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(directory: Path, **labels: Any) -> Iterator[None]:
    """Append all that this process logs, and what its workers do, to ``log.jsonl`` in a run's folder.

    Lines of workers that an earlier process, killed, had not merged yet are merged first.

    Args:
        directory: of the run.
        labels: on every line, ``run`` above all.
    """
    global _destination
    outer, outer_labels = _destination, dict(_labels)
    level = min([logging.INFO, *(sink.level for sink in _sinks)])
    sink, echo = _File(directory / FILE, level), None
    if not _sinks and not logging.getLogger().handlers:
        echo = _Stderr("text", logging.WARNING)  # our handler keeps logging from printing warnings itself
        _add(echo)
    _add(sink)
    bind(**labels)
    _destination = Destination(directory=str(directory.absolute()), level=level, labels={})
    merger = _Merger(directory)
    merger.start()
    try:
        yield
    finally:
        merger.stop()
        _destination = outer
        for own in (sink, echo):
            if own is not None:
                _remove(own)
        sink.close()
        with _lock:
            _labels.clear()
            _labels.update(outer_labels)


def destination() -> Destination | None:
    """What a process that is started now has to :func:`join`; None where no run is recorded."""
    if _destination is None:
        return None
    own = ("worker", "rank")
    return replace(_destination, labels={name: value for name, value in _labels.items() if name not in own})


def join(where: Destination | None, **labels: Any) -> None:
    """Log as one of a run's workers from now on; a second call moves this process to another run or trial.

    Args:
        where: what :func:`destination` gave in the process that started this one; None to log nowhere.
        labels: of this worker, ``trial`` above all; ``worker`` (host and process) is added.
    """
    global _destination
    with _lock:
        former = next((sink for sink in _sinks if isinstance(sink, _File)), None)
        if where is not None:
            if former is None or former.path.parent.parent != Path(where.directory):
                name = f"{socket.gethostname()}-{os.getpid()}"
                _add(_File(Path(where.directory) / INBOX / f"{name}-{time.time_ns()}.jsonl", where.level))
            else:
                former = None
            logging.getLogger("medray").setLevel(where.level)
        if former is not None:
            _remove(former)
            former.close()
        _destination = where
        _labels.clear()
        if where is not None:
            bind(**{**where.labels, "worker": f"{socket.gethostname()}-{os.getpid()}", **labels})


class _Merger:
    """Brings the lines of the workers' files into this process's sinks."""

    def __init__(self, directory: Path) -> None:
        self._inbox = directory / INBOX
        self._read: dict[Path, int] = {}  # bytes
        self._known: frozenset[bytes] = frozenset()
        if self._inbox.is_dir():
            with contextlib.suppress(OSError):
                self._known = frozenset((directory / FILE).read_bytes().splitlines())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="medray-logs", daemon=True)

    def start(self) -> None:
        self._gather()
        self._known = frozenset()
        self._thread.start()

    def stop(self) -> None:
        """Take what is left, and remove the files."""
        self._over.set()
        self._thread.join()
        self._gather()
        with contextlib.suppress(OSError):
            for path in self._read:
                path.unlink(missing_ok=True)
            self._inbox.rmdir()

    def _run(self) -> None:
        while not self._over.wait(POLL):
            self._gather()

    def _gather(self) -> None:
        for path in sorted(self._inbox.glob("*.jsonl")):
            with contextlib.suppress(OSError):
                with path.open("rb") as file:
                    file.seek(self._read.get(path, 0))
                    data = file.read()
                whole = data.rfind(b"\n") + 1
                self._read[path] = self._read.get(path, 0) + whole
                for line in data[:whole].splitlines():
                    if line not in self._known:
                        self._pass_on(line)

    def _pass_on(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if isinstance(row, dict):
            with _lock:
                _give(row, line.decode())
