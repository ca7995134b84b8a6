"""Batches made ahead of the training: by threads or in place, and by as many helpers as the measured wait asks for."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["DEPTH", "Helpers", "in_threads", "shared_memory", "usable_cpus"]

log = logging.getLogger(__name__)
Key = TypeVar("Key")
Made = TypeVar("Made")

DEPTH = 2
"""Batches that a helper may be ahead by, so that one slow batch doesn't stop the training."""
TOLERATED = 0.05
"""Share of the time that may go on waiting before another number of helpers is tried."""
GAIN = 1.02
"""Factor in samples a second by which more helpers must prove themselves."""
WINDOW = 10.0
"""Seconds of steps, at least, that a number of helpers is judged by."""


class Helpers:
    """How many helpers make batches ahead of the training.

    Between epochs: where more than ``TOLERATED`` of the time went on waiting, twice as many are tried. They stay if
    more samples a second were trained on with them; if not, the former number returns for good. Helpers that take the
    cores that train, and bring nothing, thus cost an epoch or two. What the batches hold doesn't depend on any of it.

    Args:
        start: of them to begin with; 0: batches are made in place.
        most: of them; with ``start`` the same, the number is fixed.
    """

    def __init__(self, start: int, most: int) -> None:
        self.number, self.most = start, most
        self._settled = False
        self._fresh = True  # what helpers cost to start is not what they bring
        self._former: tuple[int, float] | None = None  # number and samples a second, while more are on trial
        self._sums = (0.0, 0.0, 0.0)

    def again(self) -> Helpers:
        """The same anew, for another loader."""
        return Helpers(self.number, self.most)

    def observe(self, samples: float, seconds: float, waited: float) -> None:
        """Tell of an epoch: samples trained on, seconds of its steps, seconds of these that passed waiting."""
        if self._fresh:
            self._fresh = False
            return
        self._sums = (self._sums[0] + samples, self._sums[1] + seconds, self._sums[2] + waited)
        if self._settled or self._sums[1] < WINDOW:
            return
        rate, share = self._sums[0] / self._sums[1], self._sums[2] / self._sums[1]
        self._sums = (0.0, 0.0, 0.0)
        if self._former is not None:
            number, before = self._former
            self._former = None
            if rate < before * GAIN:
                log.info("loader: %d helpers brought nothing (%.3g samples/s, before: %.3g)", self.number, rate, before)
                self._change(number)
                self._settled = True
                return
        if share > TOLERATED and self.number < self.most:
            self._former = (self.number, rate)
            more = min(self.most, max(1, 2 * self.number))
            log.info("loader: %.0f %% of the time went on waiting; trying %d helpers", 100 * share, more)
            self._change(more)

    def _change(self, number: int) -> None:
        self.number, self._fresh = number, True


def in_threads(make: Callable[[Key], Made], keys: Iterable[Key], threads: int) -> Iterator[Made]:
    """``make(key)`` of every key, in order, made ahead by threads of one core each.

    PyTorch and NumPy let go of the interpreter while they compute, so threads help, and they share all memory with the
    training. An iteration that is given up lets its threads finish what they are at.
    """
    pool = ThreadPoolExecutor(threads, "medray-loader", initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future[Made]] = deque()
    try:
        for key in keys:
            ahead.append(pool.submit(make, key))
            if len(ahead) > DEPTH * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def usable_cpus() -> int:
    """Cores of this training: its share of threads, which engines set, and no more than the process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, torch.get_num_threads()))


def shared_memory() -> int:
    """Bytes free where processes hand batches over; a container's default is 64 MiB, and to exceed it kills them."""
    place = Path("/dev/shm")
    return shutil.disk_usage(place).free if place.is_dir() else 2**62
