"""Chain: a file of JSON lines that is only ever added to, each line carrying the hash of the one before.

A line lies on the disk before :meth:`Chain.append` returns. What a crash leaves of a line that was never acted upon is
cut off by the next one. A line that was altered, removed or put in shows, and is named; that the whole file was
replaced shows by a copy of :attr:`Chain.head` kept elsewhere.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medray.errors import PrivacyError

GENESIS = "0" * 64
MAX_BYTES = 256 << 20
MAX_LINE = 1 << 20

Record = dict[str, Any]


@dataclass
class Lines:
    """A chain as read, under its lock.

    Attributes:
        records: of all whole lines, without their hashes.
        head: hash of the last one.
        whole, torn: bytes of the whole lines, and of what a crash left behind them.
    """

    records: list[Record] = field(default_factory=list)
    head: str = GENESIS
    whole: int = 0
    torn: int = 0


class Chain:
    """The chain at ``path``; its directory must be there.

    Args:
        path: of the file.
        what: what the file is, for messages.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path, self.what = Path(path), what

    def create(self) -> None:
        """Begin the file, readable by its owner alone.

        Raises:
            FileExistsError: there is one.
            OSError: it can't be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        handle = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> Lines:
        """All lines, once they have been verified.

        Raises:
            PrivacyError: there is no file, or a line is broken, which is named.
        """
        try:
            with self.locked() as lines:
                return lines
        except FileNotFoundError:
            raise PrivacyError(f"{self.path}: there is no such file. Give the path of {self.what}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lines]:
        """The file's lines, with nobody else writing.

        Raises:
            FileNotFoundError: there is none.
            PrivacyError: a line is broken, which is named, or it can't be opened.
        """
        try:
            handle = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PrivacyError(f"{self.path}: can't be opened ({error.strerror}). {self.what} is a file") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._handle = handle
            yield self._read(handle)
        finally:
            os.close(handle)  # which unlocks it too

    def append(self, lines: Lines, record: Record) -> None:
        """Add a line, within :meth:`locked`, and wait until it lies on the disk; it bears the record's time, or now.

        Raises:
            PrivacyError: it is too long, or could not be written; then nothing was added.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        body = {"n": len(lines.records), "time": now, **record, "previous": lines.head}
        digest = _digest(body)
        line = _encode({**body, "hash": digest})
        if len(line) > MAX_LINE:
            raise PrivacyError(f"{self.path}: a line of {len(line)} bytes; {self.what} has lines of {MAX_LINE} at most")
        try:
            if lines.torn:
                os.ftruncate(self._handle, lines.whole)
            os.lseek(self._handle, lines.whole, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(self._handle, line[written:])
            os.fsync(self._handle)
        except OSError as error:
            raise PrivacyError(
                f"{self.path}: {self.what} could not be written ({error.strerror}), so nothing was allowed. Free space"
            ) from error
        lines.records.append(body)
        lines.head, lines.whole, lines.torn = digest, lines.whole + len(line), 0

    def _read(self, handle: int) -> Lines:
        size = os.fstat(handle).st_size
        if size > MAX_BYTES:
            raise PrivacyError(f"{self.path}: {size} bytes; {self.what} has at most {MAX_BYTES}. This is none")
        content = b""
        os.lseek(handle, 0, os.SEEK_SET)
        while len(content) < size and (part := os.read(handle, size - len(content))):
            content += part
        lines = Lines()
        *whole, rest = content.split(b"\n")
        lines.torn = len(rest)
        for number, line in enumerate(whole, start=1):
            try:
                record, lines.head = _follow(lines, line)
            except (ValueError, TypeError, RecursionError) as error:
                raise self.broken(number, error) from None
            lines.records.append(record)
            lines.whole += len(line) + 1
        return lines

    def broken(self, number: int, error: Exception) -> PrivacyError:
        """The error that names a line which can't be what was written."""
        return PrivacyError(
            f"{self.path}: line {number} is broken ({error or type(error).__name__}). {self.what} was changed by hand "
            "or damaged: restore it from a copy; until then nothing is allowed"
        )


def _follow(lines: Lines, line: bytes) -> tuple[Record, str]:
    """A line's record and hash, where it follows those before it."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    digest = record.pop("hash", None)
    if record.get("previous") != lines.head:
        raise ValueError("it does not follow the line before it")
    if digest != _digest(record) or _encode({**record, "hash": digest}) != line + b"\n":
        raise ValueError("its hash does not fit its content")
    if record.get("n") != len(lines.records):
        raise ValueError(f"it is number {record.get('n')}, and {len(lines.records)} comes next")
    return record, str(digest)


def _encode(record: Record) -> bytes:
    return (json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


def _digest(record: Record) -> str:
    return hashlib.sha256(_encode(record)).hexdigest()
