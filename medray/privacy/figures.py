"""Figures that are measured on private cases and leave with noise."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from medray.privacy.noise import SecureRandom

__all__ = ["private_mean"]

CLEAR = 4.0
"""Standard deviations of its noise that the noisy number of units must exceed before a mean is told."""


def private_mean(scores: npt.ArrayLike, groups: Sequence[Hashable] | None, noise: float, source: SecureRandom) -> float:
    """The mean of scores in 0..1, by the Gaussian mechanism: (noise, rate 1, one step) in a history.

    A unit adds at most (1, 1) to (sum of scores, number of units), a vector of norm sqrt(2); both get noise of
    ``noise`` times that, and their ratio is told. Where units are too few for the noise it is NaN: from some
    ``4 sqrt(2) noise`` units on (28 for a noise of 5) there is a figure.

    Args:
        scores: (N,), one a case; what is not finite counts as 0, what lies outside as the nearest bound.
        groups: the patient of each case, whose scores are averaged to one; None: each case is a unit.
        noise: multiplier, above 0.
        source: of the noise.
    """
    values = np.clip(np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0), 0.0, 1.0)
    if groups is not None:
        by: dict[Hashable, list[float]] = {}
        for group, value in zip(groups, values.tolist(), strict=True):
            by.setdefault(group, []).append(value)
        values = np.array([np.mean(rows) for rows in by.values()])
    std = noise * math.sqrt(2.0)
    first, second = source.normal(2) * std
    total, count = float(values.sum()) + float(first), len(values) + float(second)
    return float(np.clip(total / count, 0.0, 1.0)) if count > CLEAR * std else math.nan
