"""Where requests' files lie while they are answered: in the private state folder, no longer than their process lives.

A process that is killed can't remove what it had: the next one does. Whether another still lives is told by the lock
that it holds, not by its number, which is another's on another machine or in another container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

WORK = "work"
_HOLD = "hold"


class Work:
    """This process' part of the state folder. What is there of processes that are gone is removed.

    Args:
        state: the server's private folder.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, state: Path) -> None:
        root = state / WORK
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _held(root / "lock"):  # none is swept between its making and its lock
            _sweep(root)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
            self._descriptor = os.open(self._folder / _HOLD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def new_folder(self) -> Path:
        """A private one, for one request's files; who asks for it removes it.

        Raises:
            OSError: it can't be written.
        """
        return Path(tempfile.mkdtemp(dir=self._folder))

    def close(self) -> None:
        """Remove all of it; once."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        with contextlib.suppress(OSError):  # BlockingIOError: it lives
            descriptor = os.open(folder / _HOLD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
