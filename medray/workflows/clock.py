"""The study's clock: what of the budget is spent, over all sittings, and in which stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Clock:
    """Wall clock of a study that survives its process.

    Args:
        path: ``clock.json`` of the study.
        budget: seconds for all of it.
        started: epoch seconds at which this sitting began; None for now.
    """

    def __init__(self, path: Path, budget: float, *, started: float | None = None) -> None:
        self.path, self.budget = path, budget
        now = time.time()
        self._begun = time.monotonic() - max(0.0, now - (started if started is not None else now))
        self._earlier = 0.0
        self.stages: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._saved = 0.0
        # A file that was damaged costs the account of earlier sittings, not the study.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            spent, stages = float(stored["spent"]), {str(k): float(v) for k, v in stored["stages"].items()}
            if math.isfinite(spent):
                self._earlier, self.stages = max(0.0, spent), stages

    @property
    def spent(self) -> float:
        """Seconds so far, earlier sittings included."""
        return self._earlier + time.monotonic() - self._begun

    @property
    def left(self) -> float:
        """Seconds until the budget is over; may be negative."""
        return self.budget - self.spent

    @property
    def booked(self) -> dict[str, float]:
        """Seconds of each stage so far, of those that still run too."""
        now = time.monotonic()
        running = {name: self.stages.get(name, 0.0) + now - begun for name, begun in self._running.items()}
        return self.stages | running

    def save(self, *, every: float = 0.0) -> None:
        """Write what is spent, unless that was done less than ``every`` seconds ago."""
        if time.monotonic() - self._saved < every:
            return
        self._saved = time.monotonic()
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps({"spent": self.spent, "stages": self.stages}), encoding="utf-8")
        partial.replace(self.path)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book the time of a block under ``name``."""
        begun = self._running[name] = time.monotonic()
        try:
            yield
        finally:
            del self._running[name]
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - begun
            self.save()
