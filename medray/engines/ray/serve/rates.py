"""How often a key may ask, and how many may wait: counted over all replicas of a machine, or within one."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from medray.engines.ray.serve.refusal import RefusedError

_RECORD = struct.Struct("<dd")


class RateLimit:
    """A token bucket for each key, in a small file that the replicas of a machine share.

    A key may ask a tenth of a minute's requests (at least one) at once, and refills evenly.

    Args:
        folder: of the buckets; is made.
        clock: seconds, alike in all processes of the machine.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._clock = folder, clock

    def take(self, key: str, per_minute: int) -> None:
        """Count one request.

        Args:
            key: the key's id.
            per_minute: that it may make.

        Raises:
            RefusedError: 429, it has made them.
        """
        most, rate = max(1.0, per_minute / 10), per_minute / 60
        descriptor = os.open(self._folder / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            now = self._clock()
            stored = os.pread(descriptor, _RECORD.size, 0)
            tokens, last = _RECORD.unpack(stored) if len(stored) == _RECORD.size else (most, now)
            tokens = min(most, tokens + max(0.0, now - last) * rate)
            allowed = tokens >= 1
            os.pwrite(descriptor, _RECORD.pack(tokens - allowed, now), 0)
        finally:
            os.close(descriptor)
        if not allowed:
            raise RefusedError(
                429,
                "rate",
                f"this key may make {per_minute} requests a minute; wait, or ask for a higher limit",
                retry_after=max(1, math.ceil((1 - tokens) / rate)),
            )


class Admission:
    """At most so many predictions wait or run here; the next is told to come again."""

    def __init__(self, most: int) -> None:
        self._most, self._inside = most, 0
        self._lock = threading.Lock()
        self._seconds = 1.0

    @property
    def inside(self) -> int:
        """Predictions that wait or run."""
        return self._inside

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one place.

        Raises:
            RefusedError: 429, all are taken; with the seconds after which one should be free.
        """
        with self._lock:
            if self._inside >= self._most:
                raise RefusedError(
                    429,
                    "busy",
                    f"{self._most} predictions wait here already (limits.waiting); try again",
                    retry_after=max(1, min(60, math.ceil(self._seconds))),
                )
            self._inside += 1
        begin = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                self._seconds += 0.2 * (time.monotonic() - begin - self._seconds)  # a moving mean
