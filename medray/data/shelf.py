"""The folder in which prepared cases lie: what is there, how large it may grow, and what goes first.

Locks are the kernel's (flock): a process that is killed lets go of them by dying. A store is held, shared, by everyone
who has it open; one that nobody holds may be removed. Even one that is removed from under a reader stays readable
through the mapping that the reader has. On a file system without locks nothing is removed, and several may build the
same at once, which costs time and no more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medray.errors import ConfigError

__all__ = ["Entry", "builder", "entries", "hold", "limit", "trim"]

STATEMENT = "store.json"
LIMIT = "MEDRAY_CACHE_LIMIT"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One store.

    Attributes:
        path: its folder.
        source: the data that it was prepared from, as the user named them.
        size: bytes on disk.
        used: epoch seconds at which it was last opened.
        in_use: some process has it open.
    """

    path: Path
    source: str
    size: int
    used: float
    in_use: bool


def entries(directory: Path) -> list[Entry]:
    """The stores of a folder, the one that was used last first; what isn't whole is left out."""
    found = []
    for path in directory.glob(f"*/{STATEMENT}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stated = json.loads(path.read_text(encoding="utf-8"))
            size = sum(int(n) for n in stated["files"].values())
            found.append(
                Entry(
                    path=path.parent,
                    source=str(stated.get("source", "?")),
                    size=size,
                    used=path.stat().st_mtime,
                    in_use=not _is_free(path),
                )
            )
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def limit(directory: Path) -> int:
    """Bytes that the folder may take: ``MEDRAY_CACHE_LIMIT`` ("50GB"), or half of what the disk has for it.

    Raises:
        ConfigError: the variable is no size.
    """
    asked = os.environ.get(LIMIT)
    if asked is None:
        directory.mkdir(parents=True, exist_ok=True)
        return (shutil.disk_usage(directory).free + sum(entry.size for entry in entries(directory))) // 2
    text = asked.strip().upper()
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    try:
        size = float(text.removesuffix(unit)) * _UNITS.get(unit, 1)
    except ValueError:
        size = -1.0
    if not 0 <= size < 2**60:
        raise ConfigError(f"{LIMIT}={asked!r} is no size; write bytes, or a number with MB, GB or TB, such as 50GB")
    return int(size)


def trim(directory: Path, most: int, *, keep: Path | None = None) -> list[Entry]:
    """Remove stores that nobody has open, the one that was used longest ago first, until ``most`` bytes are left.

    Args:
        directory: of the stores.
        most: bytes that may stay.
        keep: a store that stays in any case.

    Returns:
        what was removed.
    """
    there = entries(directory)
    total, removed = sum(entry.size for entry in there), []
    for entry in reversed(there):
        if total <= most:
            break
        if entry.path == keep or not _remove(entry.path):
            continue
        total -= entry.size
        removed.append(entry)
    return removed


def hold(path: Path) -> BinaryIO:
    """Hold a store until the file that this returns is closed, and note that it was used.

    Raises:
        OSError: it isn't there (any more).
    """
    file = (path / STATEMENT).open("rb")
    try:
        _lock(file, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):  # a cache that others own can be read all the same
            os.utime(path / STATEMENT)
        if not (path / STATEMENT).exists():
            raise FileNotFoundError(f"{path} was removed")
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def builder(directory: Path, name: str) -> Iterator[None]:
    """Be the only one to build ``name``; who comes later waits, and may find it built."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".{name}.lock"
    while True:
        with path.open("wb") as file:
            _lock(file, fcntl.LOCK_EX)
            if not _is_same(path, file):  # whom we waited for has removed it on leaving
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _lock(file: BinaryIO, kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _is_same(path: Path, file: BinaryIO) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _is_free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _remove(path: Path) -> bool:
    """Whether the store is gone: not where someone has it open."""
    try:
        with (path / STATEMENT).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # First what says that the store is whole: a removal that is interrupted leaves nothing that looks so.
            (path / STATEMENT).unlink()
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return False
    return True
