"""Aggregates that a few bad updates can't move far. Sites count alike, or one could claim the weight of many.

Coordinate-wise median and trimmed mean: Yin et al., ICML 2018 (arXiv:1803.01498). Krum: Blanchard et al., NeurIPS 2017
(arXiv:1703.02757).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import FederationError
from medray.learn.aggregation.mean import Weights

__all__ = ["krum", "median", "trimmed_mean"]

Updates = Sequence[Mapping[str, npt.NDArray[Any]]]


def median(updates: Updates) -> Weights:
    """The median of each entry over N sites."""
    return {
        name: np.median(np.stack([u[name] for u in updates]), axis=0).astype(first.dtype)
        for name, first in updates[0].items()
    }


def trimmed_mean(updates: Updates, trim: float) -> Weights:
    """The mean of each entry without the ``floor(trim * N)`` smallest and largest of N sites."""
    cut = int(trim * len(updates) + 1e-9)
    result: Weights = {}
    for name, first in updates[0].items():
        ordered = np.sort(np.stack([u[name] for u in updates]).astype(np.float64), axis=0)
        result[name] = ordered[cut : len(updates) - cut].mean(axis=0).astype(first.dtype)
    return result


def krum(updates: Updates, byzantine: int) -> int:
    """Which of N updates lies nearest to its N - f - 2 nearest others, of which f may be bad.

    Raises:
        FederationError: N < f + 3: no neighbour is left to compare with.
    """
    count = len(updates)
    near = count - byzantine - 2
    if near < 1:
        raise FederationError(
            f"krum with federation.byzantine={byzantine} needs at least {byzantine + 3} updates, there are {count}. "
            "Lower federation.byzantine, or ask more sites"
        )
    flat = np.stack([np.concatenate([u[name].ravel() for name in updates[0]]).astype(np.float64) for u in updates])
    distances = np.array([((flat - one) ** 2).sum(axis=1) for one in flat])
    np.fill_diagonal(distances, np.inf)
    return int(np.sort(distances, axis=1)[:, :near].sum(axis=1).argmin())
