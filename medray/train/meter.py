"""How fast a run trains, and what it waits for: figures for whoever watches it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from medray.train import memory

__all__ = ["Meter", "Spent"]


class Spent(NamedTuple):
    """What steps came to.

    Attributes:
        samples: of this process.
        seconds: of the steps, the wait included.
        waited: seconds of waiting for batches.
    """

    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def share(self) -> float:
        """Of the time that was waited, 0..1."""
        return min(1.0, self.waited / self.seconds) if self.seconds > 0 else 0.0

    def more(self, samples: int = 0, seconds: float = 0.0, waited: float = 0.0) -> Spent:
        return Spent(self.samples + samples, self.seconds + seconds, self.waited + waited)

    def since(self, earlier: Spent) -> Spent:
        return self.more(-earlier.samples, -earlier.seconds, -earlier.waited)


class Meter:
    """Counts steps between two readings.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._total = self._read = self._epoch = Spent()  # of the run, at the last reading, at the last epoch's end
        self._use: list[float] = []
        self._can_ask = device.type == "cuda"

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for a batch."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._total = self._total.more(waited=time.perf_counter() - began)

    def stepped(self, samples: int, seconds: float) -> None:
        """A step has ended: so many samples of this process, in so many seconds, the wait for them included."""
        self._total = self._total.more(samples, seconds)

    def ask_device(self) -> None:
        """Note how busy the device is just now, as the driver says; now and then is enough."""
        if not self._can_ask:
            return
        try:
            self._use.append(torch.cuda.utilization(self._device) / 100)
        except Exception:  # NVML's Python module is absent, or the driver (a slice of a device) does not tell
            self._can_ask = False

    def rates(self) -> tuple[float, float]:
        """Samples a second of this process, and the share of the time (0..1) that it waited for data, since the last
        reading; this ends it."""
        spent, self._read = self._total.since(self._read), self._total
        return (spent.samples / max(spent.seconds, 1e-9), spent.share) if spent.samples else (0.0, 0.0)

    def epoch(self) -> Spent:
        """What the steps since the last call came to; this ends it."""
        spent, self._epoch = self._total.since(self._epoch), self._total
        return spent

    def wait(self) -> float:
        """The share of all steps' time (0..1) that this process waited for data."""
        return self._total.share

    def device(self) -> dict[str, float]:
        """``system/peak_memory_mb`` (MiB, since the run's start) and, of a CUDA device that tells it,
        ``system/device_use`` (0..1, mean since the last reading)."""
        figures = {"system/peak_memory_mb": memory.peak_mb(self._device)}
        if self._use:
            figures["system/device_use"] = sum(self._use) / len(self._use)
            self._use.clear()
        return figures
