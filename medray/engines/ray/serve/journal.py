"""What is kept of requests: a line for each prediction, and answers to be given again.

The audit trail says who asked which model about what, and what it answered, as hashes: no pixel, no tag, no name of a
file. Each line is one write to a file opened for appending, and on the disk before the client has its answer.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.engines.ray.serve.refusal import RefusedError, key_reused
from medray.errors import ServingError

_SWEEP_SECONDS = 30.0


class Audit:
    """Appends to ``audit.jsonl``; several processes may. Lines that come together share one flush of the disk.

    Args:
        path: of the file, which may lie on append-only storage.

    Raises:
        ServingError: it can't be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServingError(f"{path}: the audit trail can't be written ({error.strerror or error})") from None
        self._waiting: queue.SimpleQueue[tuple[bytes, Future[None]] | None] = queue.SimpleQueue()
        self._closing, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def submit(self, **fields: Any) -> Future[None]:
        """One line; the future is done when it is on the disk.

        Its error is a :class:`RefusedError`, 503, where the disk is full or gone: what can't be accounted for is not
        answered.
        """
        row = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"), **fields}
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # a client that goes away cancels what it waits for: this can't be
        self._waiting.put((json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n", future))
        return future

    def write(self, **fields: Any) -> None:
        """One line, on the disk when this returns.

        Raises:
            RefusedError: as :meth:`submit`.
        """
        self.submit(**fields).result()

    def close(self) -> None:
        """Write what waits, and close the file; once."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._waiting.put(None)
            self._thread.join()
            os.close(self._descriptor)

    @property
    def is_alive(self) -> bool:
        """Whether lines are still written."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            over = False
            while not self._waiting.empty():
                item = self._waiting.get()
                if item is None:
                    over = True
                    break
                batch.append(item)
            error = self._append(b"".join(line for line, _ in batch))
            for _, future in batch:
                future.set_exception(error) if error else future.set_result(None)
            if over:
                return

    def _append(self, text: bytes) -> RefusedError | None:
        try:
            if os.write(self._descriptor, text) != len(text):
                raise OSError(0, "a line was cut short")
            os.fdatasync(self._descriptor)
        except Exception:  # this thread must outlive whatever comes
            return RefusedError(503, "no-audit", "the audit trail can't be written; try again", retry_after=10)
        return None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An answer as it was given."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Answers:
    """Answers by Idempotency-Key, so that a client that lost one gets the same again, from any replica of the machine.

    Args:
        folder: private; is made.
        seconds: for how long they are kept.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._seconds = folder, seconds
        self._swept = 0.0

    @contextlib.contextmanager
    def slot(self, who: str, key: str, request: str) -> Iterator[Slot]:
        """Hold a client's key while its request is answered.

        Args:
            who: the id of the API key.
            key: of the client.
            request: hash of all that was asked.

        Raises:
            RefusedError: 409, the first request with it is still being answered; 422, it was another request's.
        """
        self.sweep()
        name = hashlib.sha256(f"{who}\0{key}".encode("utf-8", "surrogatepass")).hexdigest()
        path = self._folder / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process that dies
            except OSError:
                message = "the first request with this Idempotency-Key is still being answered; ask again"
                raise RefusedError(409, "in-flight", message, retry_after=1) from None
            yield Slot(descriptor, request, self._seconds)
        finally:
            os.close(descriptor)

    def sweep(self) -> None:
        """Remove what is older than it is kept; called over and over."""
        now = time.time()
        if now - self._swept < min(_SWEEP_SECONDS, self._seconds):
            return
        self._swept = now
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > self._seconds:
                    path.unlink()


class Slot:
    """One client's key, held. ``kept`` is what was answered before, if anything."""

    def __init__(self, descriptor: int, request: str, seconds: float) -> None:
        self._descriptor, self._request = descriptor, request
        self.kept = self._read(seconds)

    def _read(self, seconds: float) -> Kept | None:
        status = os.fstat(self._descriptor)
        if not status.st_size or time.time() - status.st_mtime > seconds:
            return None
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            try:
                head = json.loads(file.readline())
                body = file.read()
                whole = head["bytes"] == len(body)
            except (ValueError, KeyError, TypeError):
                return None
        if not whole:  # its process died while it wrote
            return None
        if head["request"] != self._request:
            raise key_reused()
        return Kept(status=head["status"], headers=head["headers"], body=body)

    def keep(self, answer: Kept) -> None:
        """Write the answer down; a full disk costs the repetition, not the answer."""
        head = {
            "request": self._request,
            "status": answer.status,
            "headers": dict(answer.headers),
            "bytes": len(answer.body),
        }
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            with os.fdopen(os.dup(self._descriptor), "wb") as file:
                file.seek(0)
                file.write(json.dumps(head).encode() + b"\n" + answer.body)
