"""The server's own adaptive step: FedAdam, FedYogi, FedAdagrad (Reddi et al., ICLR 2021, arXiv:2003.00295, alg. 2).

The mean update is taken for a negative gradient. As in the paper there is no bias correction; ``tau`` is both what is
added to the root and, squared, what the mean of squares starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from medray.learn.aggregation.mean import Weights

__all__ = ["Moments", "adaptive_step"]

Rule = Literal["fedadam", "fedyogi", "fedadagrad"]


@dataclass(frozen=True)
class Moments:
    """Means of updates and of their squares, by name; empty before the first round."""

    first: Weights
    second: Weights


def adaptive_step(
    update: Weights, moments: Moments, *, rule: Rule, lr: float, beta1: float, beta2: float, tau: float
) -> tuple[Weights, Moments]:
    """What to add to the global weights, and the moments for the next round (float64).

    Args:
        update: the sites' weighted mean.
        moments: of the former round.
        rule: how the mean of squares moves; fedadagrad has no memory of the mean and sums the squares.
        lr, beta1, beta2, tau: the paper's eta, beta 1, beta 2, tau.
    """
    steps: Weights = {}
    first: Weights = {}
    second: Weights = {}
    for name, value in update.items():
        delta = value.astype(np.float64)
        square = delta**2
        v = moments.second.get(name, np.full(delta.shape, tau**2))
        keep = 0.0 if rule == "fedadagrad" else beta1
        m = keep * moments.first.get(name, np.zeros(delta.shape)) + (1 - keep) * delta
        if rule == "fedadagrad":
            v = v + square
        elif rule == "fedadam":
            v = beta2 * v + (1 - beta2) * square
        else:
            v = v - (1 - beta2) * square * np.sign(v - square)
        steps[name] = (lr * m / (np.sqrt(v) + tau)).astype(value.dtype)
        first[name], second[name] = m, v
    return steps, Moments(first, second)
