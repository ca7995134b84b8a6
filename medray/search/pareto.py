"""Several objectives at once: non-dominated ranks, the front, its hypervolume.

Points are losses, shape (N, M): N trials, M objectives, lower is better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def losses(values: Sequence[Sequence[float]], directions: Sequence[str]) -> Floats:
    """Objective values, shape (N, M), as losses: ``max`` is negated, NaN is the worst."""
    array = np.asarray(values, dtype=np.float64).reshape(len(values), len(directions))
    array = array * np.where(np.asarray(directions) == "max", -1.0, 1.0)
    return np.where(np.isnan(array), np.inf, array)


def non_dominated_rank(points: Floats) -> NDArray[np.int64]:
    """The number of the front that each point lies on, shape (N,); 0 is the best (Deb et al. 2002)."""
    count = len(points)
    ranks = np.full(count, -1, dtype=np.int64)
    no_worse = (points[:, None, :] <= points[None, :, :]).all(axis=2)
    better = (points[:, None, :] < points[None, :, :]).any(axis=2)
    dominates: NDArray[np.bool_] = np.logical_and(no_worse, better)
    front = 0
    while (ranks < 0).any():
        left = ranks < 0
        ranks[left & ~dominates[left].any(axis=0)] = front
        front += 1
    return ranks


def front(points: Floats) -> list[int]:
    """Indices of the points that no other dominates, in the order given."""
    return [int(index) for index in np.flatnonzero(non_dominated_rank(points) == 0)] if len(points) else []


def knee(points: Floats) -> int:
    """Index of the front's point that lies nearest to the ideal one, each loss scaled to 0..1 over the front."""
    members = front(points)
    scaled = points[members]
    finite = np.where(np.isfinite(scaled), scaled, np.nan)
    low, high = np.nanmin(finite, axis=0), np.nanmax(finite, axis=0)
    scaled = (scaled - low) / np.where(high > low, high - low, 1.0)
    return members[int(np.argmin(np.linalg.norm(scaled, axis=1)))]


def hypervolume(points: Floats, reference: Sequence[float]) -> float:
    """Volume that (N, M) points dominate below ``reference``; points beyond it add nothing.

    Sliced along the last objective (HSO: While et al. 2006). Exact; meant for fronts of some dozens of points.
    """
    limit = np.asarray(reference, dtype=np.float64)
    inside = points[(points < limit).all(axis=1)] if len(points) else np.empty((0, len(limit)))
    return _volume(inside[front(inside)], limit)


def _volume(points: Floats, limit: Floats) -> float:
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(limit[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    depths = np.append(points[1:, -1], limit[-1]) - points[:, -1]
    return float(
        sum(depth * _volume(points[: index + 1, :-1], limit[:-1]) for index, depth in enumerate(depths) if depth > 0)
    )
