"""Predictor: anything that maps a batch of prepared arrays to logits.

Shape legend: B batch, C channels, K classes, *s spatial (H, W) or (X, Y, Z).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Kind = Literal["classification", "multilabel", "segmentation"]

Callback = Callable[[Floats], Floats]
"""What the functions of this package really need: (B, C, *s) to logits (B, K[, *s])."""


class Predictor(Protocol):
    """One engine with one model in it."""

    @property
    def name(self) -> str:
        """The runtime's name: torch, onnx, openvino, tensorrt"""

    @property
    def precision(self) -> str:
        """Of the arithmetic: fp32, bf16, fp16, int8."""

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) float32 to logits (B, K) or (B, K, *s) float32."""


def softmax(logits: npt.NDArray[Any], axis: int = 1) -> Floats:
    """Softmax over ``axis`` in float32, without overflow."""
    shifted = np.asarray(logits, dtype=np.float32) - np.max(logits, axis=axis, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=axis, keepdims=True)
    return shifted


def sigmoid(logits: npt.NDArray[Any]) -> Floats:
    """Logistic function in float32, without overflow."""
    values = np.asarray(logits, dtype=np.float32)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def probabilities(logits: npt.NDArray[Any], kind: Kind, temperature: float = 1.0) -> Floats:
    """Logits (B, K[, *s]) to calibrated probabilities: per label for multilabel, over the classes otherwise."""
    scaled = np.asarray(logits, dtype=np.float32) / np.float32(temperature)
    return sigmoid(scaled) if kind == "multilabel" else softmax(scaled, axis=1)
