"""From logits to probabilities, in NumPy: pure functions, without overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["sigmoid", "softmax"]

Floats = npt.NDArray[np.float32]


def softmax(logits: npt.NDArray[Any], axis: int = 1) -> Floats:
    """Softmax over ``axis`` in float32, without overflow."""
    values = np.asarray(logits, dtype=np.float32)
    shifted = values - values.max(axis=axis, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=axis, keepdims=True)
    return shifted


def sigmoid(logits: npt.NDArray[Any]) -> Floats:
    """Logistic function in float32, without overflow."""
    values = np.asarray(logits, dtype=np.float32)
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
