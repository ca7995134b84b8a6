"""The weighted mean of updates: FedAvg (McMahan et al., AISTATS 2017, arXiv:1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Weights", "mean"]

Weights = dict[str, npt.NDArray[Any]]
"""Floating-point arrays by the name that the network's ``state_dict()`` gives them."""


def mean(updates: Sequence[Mapping[str, npt.NDArray[Any]]], counts: Sequence[float]) -> Weights:
    """Each site counts by its number of cases. Summed in float64, so that the order of sites hardly matters.

    Args:
        updates: of N sites, alike in names and shapes.
        counts: N numbers above 0.
    """
    total = float(sum(counts))
    result: Weights = {}
    for name, first in updates[0].items():
        summed = np.zeros(first.shape, np.float64)
        for update, count in zip(updates, counts, strict=True):
            summed += update[name].astype(np.float64) * (count / total)
        result[name] = summed.astype(first.dtype)
    return result
