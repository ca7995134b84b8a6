"""How fast a run trains, and what it waits for: figures for whoever watches it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from medray.train import memory

__all__ = ["Meter"]


class Meter:
    """Counts steps between two readings.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        self._use: list[float] = []
        self._can_ask = device.type == "cuda"

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for a batch."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def stepped(self, samples: int, seconds: float) -> None:
        """A step has ended: so many samples of this process, in so many seconds, the wait for them included."""
        self._samples += samples
        self._seconds += seconds

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
        seconds = max(self._seconds, 1e-9)
        rates = (self._samples / seconds, min(1.0, self._waited / seconds)) if self._samples else (0.0, 0.0)
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
        return rates

    def device(self) -> dict[str, float]:
        """``system/peak_memory_mb`` (MiB, since the run's start) and, of a CUDA device that tells it,
        ``system/device_use`` (0..1, mean since the last reading)."""
        figures = {"system/peak_memory_mb": memory.peak_mb(self._device)}
        if self._use:
            figures["system/device_use"] = sum(self._use) / len(self._use)
            self._use.clear()
        return figures
