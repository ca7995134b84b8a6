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
    return members[int(np.argmin(distances(points[members], points[members])))]


def distances(points: Floats, reference: Floats) -> Floats:
    """Of (N, M) points to the ideal one, shape (N,); each loss is scaled to 0..1 over the front of ``reference``."""
    over = reference[front(reference)]
    finite = np.where(np.isfinite(over), over, np.nan)
    low, high = (np.nan_to_num(edge(finite, axis=0)) for edge in (np.nanmin, np.nanmax))
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    return np.asarray(np.linalg.norm(scaled, axis=1))


def normalised_hypervolume(points: Floats) -> Floats:
    """What the first 1..N of (N, M) points dominate, shape (N,): a share of the box that all of them span.

    Each loss is scaled to 0..1 over all points, and the box reaches a tenth beyond the worst of each, so that the ends
    of the front count. Points with a loss that is not finite add nothing.
    """
    finite = points[np.isfinite(points).all(axis=1)]
    if not len(finite):
        return np.zeros(len(points))
    low, high = finite.min(axis=0), finite.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    scaled = np.where(np.isfinite(scaled), scaled, np.inf)
    reference = [1.1] * points.shape[1]
    whole = 1.1 ** points.shape[1]
    return np.asarray([hypervolume(scaled[: count + 1], reference) / whole for count in range(len(points))])


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
