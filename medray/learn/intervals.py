"""Confidence intervals by the bootstrap, over patients.

Cases of one patient are not independent, so whole groups are drawn with replacement (cluster bootstrap). Limits are
bias-corrected and accelerated (BCa: Efron 1987; acceleration by leaving out one group at a time), or plain percentiles
on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "bootstrap", "paired_bootstrap"]

Array = npt.NDArray[Any]
BLOCKS = 200
"""Most sets of groups that BCa's acceleration leaves out in turn: where there are more groups, several go at once."""


class Interval(NamedTuple):
    """A statistic and its confidence limits; NaN limits where fewer than two groups were measured."""

    value: float
    low: float
    high: float


def bootstrap(
    values: Array | tuple[Array, ...],
    statistic: Callable[..., float] = np.nanmean,
    *,
    groups: Sequence[object] | Array | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """A statistic of cases with its confidence interval.

    Args:
        values: one array with a row per case, or several that are drawn together, e.g. (labels, probabilities).
        statistic: a number from the array(s); draws for which it is NaN (one class only) are left out.
        groups: (N,) the patient of each case; None where each case is its own.
        n: draws.
        seed: of the draws.
        level: of confidence.
        method: how limits are read from the draws.
    """
    arrays = tuple(np.asarray(v) for v in (values if isinstance(values, tuple) else (values,)))
    count = len(arrays[0])
    if any(len(array) != count for array in arrays) or (groups is not None and len(groups) != count):
        raise ValueError("all arrays and groups must have one row per case")
    value = float(statistic(*arrays)) if count else float("nan")
    members = _members(groups, count)
    if len(members) < 2 or np.isnan(value):
        return Interval(value, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    alone = len(members) == count
    draws = np.empty(n)
    for i in range(n):
        chosen = generator.integers(0, len(members), len(members))
        # A slice of the concatenation would do for both; this is five times quicker where no patient has two cases.
        rows = chosen if alone else np.concatenate([members[j] for j in chosen])
        draws[i] = statistic(*(array[rows] for array in arrays))
    draws = draws[~np.isnan(draws)]
    if draws.size < 2:
        return Interval(value, float("nan"), float("nan"))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and draws.min() < draws.max():
        tails = _corrected(tails, draws, value, _leave_one_out(arrays, statistic, members))
    low, high = np.quantile(draws, tails)
    return Interval(value, float(low), float(high))


def paired_bootstrap(
    a: Array | tuple[Array, ...],
    b: Array | tuple[Array, ...],
    groups: Sequence[object] | Array | None = None,
    statistic: Callable[..., float] = np.nanmean,
    *,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """``statistic(a) - statistic(b)`` with its interval, both measured on the same cases, which are drawn together.

    Args:
        a, b: as ``values`` of :func:`bootstrap`, alike in rows.
    """
    first = a if isinstance(a, tuple) else (a,)
    second = b if isinstance(b, tuple) else (b,)

    def difference(*arrays: Array) -> float:
        return float(statistic(*arrays[: len(first)])) - float(statistic(*arrays[len(first) :]))

    return bootstrap((*first, *second), difference, groups=groups, n=n, seed=seed, level=level, method=method)


def _members(groups: Sequence[object] | Array | None, count: int) -> list[Array]:
    """Row numbers of each group, in the order of first appearance, so that draws don't depend on the names."""
    if groups is None:
        return [np.array([i]) for i in range(count)]
    rows: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return [np.array(found) for found in rows.values()]


def _leave_one_out(arrays: tuple[Array, ...], statistic: Callable[..., float], members: list[Array]) -> Array:
    values = []
    count = min(len(members), BLOCKS)
    for block in range(count):
        keep = np.ones(len(arrays[0]), dtype=bool)
        keep[np.concatenate(members[block::count])] = False
        values.append(float(statistic(*(array[keep] for array in arrays))))
    found = np.array(values)
    return found[~np.isnan(found)]


def _corrected(tails: Array, draws: Array, value: float, jackknife: Array) -> Array:
    """BCa's quantiles in place of ``tails``."""
    normal = NormalDist()
    # Ties count half, so that a statistic with few values (accuracy) isn't called biased.
    below = float((draws < value).mean() + (draws == value).mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / (draws.size + 1)), draws.size / (draws.size + 1)))
    # Of blocks of several groups the same value follows: their skewness falls as their number does.
    gaps = jackknife.mean() - jackknife if jackknife.size else jackknife
    spread = float((gaps**2).sum())
    acceleration = float((gaps**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    corrected = []
    for tail in tails:
        z = bias + normal.inv_cdf(float(tail))
        corrected.append(normal.cdf(bias + z / max(1 - acceleration * z, 1e-3)))
    return np.array(corrected)
