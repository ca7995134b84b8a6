"""Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).

One number T divides all logits: it changes how sure the model says to be, and of a softmax no decision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import ModelError
from medray.learn.losses import IGNORE
from medray.predict.predictor import Floats
from medray.tasks.catalogue import find_task

LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of T: a separable validation set would drive it to 0, a useless model to infinity."""


def fit_temperature(logits: npt.NDArray[Any], targets: npt.NDArray[Any], kind: str) -> float:
    """The temperature with the smallest negative log-likelihood.

    Args:
        logits: (N, O). For segmentation each row is a voxel: see :func:`sample_voxels`.
        targets: (N,) class indices, or (N, K) zeros and ones of several labels. 255 is ignored.
        kind: of the task.

    Returns:
        T within 0.05..20; 1.0 where there is nothing to learn from.

    Raises:
        ModelError: shapes that do not belong together, or logits that are not finite.
    """
    task = find_task(kind)
    scores = np.asarray(logits, dtype=np.float64)
    truth = np.asarray(targets)
    several = task.target == "labels"
    if scores.ndim != 2 or truth.shape != (scores.shape if several else scores.shape[:1]):
        raise ModelError(
            f"calibration of {kind} got logits {scores.shape} and targets {truth.shape}; it takes (N, O) and "
            + ("(N, K)" if several else "(N,)")
        )
    if not np.isfinite(scores).all():
        raise ModelError("calibration got logits that are not finite; the model is broken, not only badly calibrated")
    scores, truth = task.calibration(scores, truth)
    known = truth != IGNORE
    scores, truth = scores[known], truth[known].astype(np.int64)
    if not len(truth):
        return 1.0

    def slope(log_t: float) -> float:
        """Derivative of the mean NLL by log T, up to the positive factor 1/T: E[z_y] - E_p[z]."""
        scaled = scores / np.exp(log_t)
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        chosen = scores[np.arange(len(truth)), truth]
        return float((chosen - (weights * scores).sum(axis=1)).mean())

    # NLL is convex in 1/T, so its derivative changes sign once: bisection can't miss and needs no library.
    low, high = float(np.log(LOWEST)), float(np.log(HIGHEST))
    if slope(low) >= 0:
        return LOWEST
    if slope(high) <= 0:
        return HIGHEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def sample_voxels(
    probabilities: Floats, target: npt.NDArray[Any], *, count: int = 20_000, seed: int = 0
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Logits and labels of randomly chosen voxels of one segmented image, for :func:`fit_temperature`.

    Args:
        probabilities: (K, *s).
        target: (*s); 255 is left out.
        count: at most so many voxels: one case more or less has the same weight whatever its size.
        seed: of the choice.

    Returns:
        (n, K) float32 log-probabilities (logits up to a constant) and (n,) int64 labels.
    """
    flat = np.flatnonzero(np.asarray(target).ravel() != IGNORE)
    if len(flat) > count:
        flat = np.sort(np.random.default_rng(seed).choice(flat, size=count, replace=False))
    chosen = probabilities.reshape(len(probabilities), -1)[:, flat].T
    return np.log(np.maximum(chosen, 1e-8)).astype(np.float32), np.asarray(target).ravel()[flat].astype(np.int64)


def temper(probabilities: Floats, temperature: float, *, axis: int = 0) -> Floats:
    """Calibrate probabilities after blending: softmax(log p / T) over ``axis``. The argmax stays what it was."""
    if temperature == 1.0:
        return probabilities
    powered = np.power(np.maximum(probabilities, 1e-8), np.float32(1.0 / temperature), dtype=np.float32)
    powered /= powered.sum(axis=axis, keepdims=True)
    return powered
