"""What fit() tells while it runs, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["FitResult", "Progress", "Stopped"]

Stopped = Literal["finished", "early", "pruned", "deadline"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One validation.

    Attributes:
        epoch: the pass over the training cases that it fell into, from 1.
        step: optimiser steps done.
        fraction: of the schedule, 0..1.
        seconds: of training so far, validations included, earlier sittings of a resumed run too.
        metrics: what ``validate`` returned.
    """

    epoch: int
    step: int
    fraction: float
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a training run came to.

    Attributes:
        best: metrics of the best validation; empty if none gave a number for the objective.
        best_epoch: the pass in which that was, from 1; 0 if there is none.
        history: one row per validation: epoch, step, fraction, seconds, lr, loss (mean since the last row; not
            under differential privacy), then the metrics.
        epochs: passes begun.
        steps: optimiser steps done.
        seconds: see :class:`Progress`.
        stopped: the schedule ended ("finished"), no gain ("early"), ``on_validation`` said so ("pruned"), no time
            ("deadline").
        weights: state dict on CPU as of the best validation (averaged where ``train.ema`` is on); of the last step if
            none.
        peak_memory_mb: of this process (CPU) or of the device's allocator (CUDA), MiB.
        step_seconds: median, loading included.
        micro_batch: samples at once in memory in the end; below ``train.batch_size`` where memory was short.
    """

    best: dict[str, float]
    best_epoch: int
    history: tuple[dict[str, Any], ...]
    epochs: int
    steps: int
    seconds: float
    stopped: Stopped
    weights: dict[str, Tensor]
    peak_memory_mb: float
    step_seconds: float
    micro_batch: int
