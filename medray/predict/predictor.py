"""Predictor: anything that maps a batch of prepared arrays to logits.

Shape legend: B batch, C channels, O outputs, K classes, *s spatial (H, W) or (X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from medray.tasks.catalogue import find_task

Floats = npt.NDArray[np.float32]
Precision = Literal["fp32", "bf16", "fp16", "int8"]

Callback = Callable[[Floats], Floats]
"""What the functions of this package really need: (B, C, *s) to logits (B, O[, *s])."""


class Predictor(Protocol):
    """One engine with one model in it."""

    @property
    def name(self) -> str:
        """The runtime's name: torch, onnx, openvino, tensorrt"""

    @property
    def precision(self) -> str:
        """Of the arithmetic: fp32, bf16, fp16, int8."""

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) float32 to logits (B, O) or (B, O, *s) float32."""


def probabilities(logits: npt.NDArray[Any], kind: str, temperature: float = 1.0) -> Floats:
    """Logits (B, O[, *s]) to calibrated probabilities (B, K[, *s]), as the task has them."""
    return find_task(kind).probabilities(np.asarray(logits, dtype=np.float32) / np.float32(temperature))
