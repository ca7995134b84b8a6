"""Keeps a store like a run's folder while a process works on it."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from medray.errors import StorageError
from medray.workflows.storage import Entry, RunStore, TakenOverError, files_of, read_mark, write_mark

__all__ = ["Mirror", "mirrored"]

PERIOD = 15.0
"""Seconds after which changes that nobody has announced are sent too (final fits, the clock)."""
_PAUSE = 1.0  # seconds between two sendings, at least
_QUIET = frozenset({"state.json"})  # renewed every few seconds: sent along, but no reason to send


class Mirror:
    """Keeps a store like a folder, for the length of a sitting. Without a store it does nothing.

    Args:
        directory: the run's folder.
        store: None for none.
        note: told, once for each outage, that the store can't be written; the run goes on, and it is tried again.
    """

    def __init__(self, directory: Path, store: RunStore | None, note: Callable[[str], None]) -> None:
        self._directory, self._store, self._note = directory, store, note
        self._lock = threading.Lock()
        self._wake, self._over = threading.Event(), threading.Event()
        self._known: dict[str, Entry] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._writer: str | None = None
        self._out = False
        self._taken: TakenOverError | None = None
        self._thread = threading.Thread(target=self._run, name="medray-store", daemon=True)

    def start(self) -> None:
        """The first sending; an address or a key that doesn't serve is found here, before anything is trained."""
        if self._store is None:
            return
        self._known = self._store.claim(self._directory)
        self._writer = read_mark(self._directory).get("writer")
        self._thread.start()

    def soon(self) -> None:
        """Something is worth sending: it is sent, and the caller does not wait."""
        self._wake.set()

    def now(self) -> None:
        """Send, and come back when it is there.

        Raises:
            StorageError: another process has taken the run over. An outage is none: it is noted.
        """
        if self._store is None:
            return
        self._send()
        if self._taken is not None:
            raise self._taken

    def close(self) -> None:
        """The last sending.

        Raises:
            StorageError: it failed: the folder here is whole, and the store is behind it.
        """
        if self._store is None or self._over.is_set():
            return
        self.stop()
        self._send()
        if self._taken is not None:
            raise self._taken
        if self._out:
            raise StorageError(
                f"{self._directory} is whole, but {self._store.url} could not be written at the end. When it can, send "
                f"it by resuming the run"
            )

    def stop(self) -> None:
        """Send nothing more of its own accord."""
        self._over.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self._wake.wait(PERIOD)
            self._over.wait(_PAUSE)  # a checkpoint follows its report
            self._wake.clear()
            if not self._over.is_set() and self._taken is None:
                self._send()

    def _send(self) -> None:
        assert self._store is not None
        with self._lock:
            seen = _stamps(self._directory)
            if seen == self._seen and not self._out:
                return
            try:
                self._known = self._store.publish(self._directory, known=self._known, writer=self._writer)
                self._seen, self._out = seen, False
            except TakenOverError as error:
                self._taken = error
            except (StorageError, OSError, sqlite3.Error) as error:
                if not self._out:
                    self._note(f"the store is behind, and will be tried again: {error}")
                self._out = True


@contextlib.contextmanager
def mirrored(directory: Path, url: str | None, note: Callable[[str], None]) -> Iterator[Mirror]:
    """Keep the run in ``directory`` at ``url`` while the block runs, its end by an error included.

    Raises:
        StorageError: at the start or at the end the store can't be written.
    """
    store = RunStore.at(url) if url else None
    if store is not None and read_mark(directory).get("url") != store.url:
        write_mark(directory, store.url)
    mirror = Mirror(directory, store, note)
    mirror.start()
    try:
        yield mirror
    except BaseException:
        with contextlib.suppress(StorageError):  # the block's own error is the one to tell
            mirror.close()
        raise
    mirror.close()


def _stamps(directory: Path) -> dict[str, tuple[int, int]]:
    """(nanoseconds, bytes) of each file; another such table means that something has changed."""
    found: dict[str, tuple[int, int]] = {}
    for path in (*files_of(directory), directory / "study.db-wal"):
        with contextlib.suppress(OSError):  # gone since
            if path.name not in _QUIET:
                status = path.stat()
                found[str(path)] = (status.st_mtime_ns, status.st_size)
    return found
