"""What the server refuses of an update, before it can touch the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.learn.aggregation.mean import Weights

__all__ = ["beyond", "fault", "norm", "too_long", "unreal", "usual_norm"]


def fault(update: Mapping[str, npt.NDArray[Any]], expected: Weights) -> str | None:
    """Why an update can't be used, in one sentence; None where nothing is wrong with its form.

    Args:
        update: as it arrived.
        expected: the global weights: names, shapes and types that it must have.
    """
    missing, strange = sorted(expected.keys() - update.keys()), sorted(update.keys() - expected.keys())
    if missing or strange:
        parts = [f"lacks {missing[0]!r}" if missing else "", f"has the unknown {strange[0]!r}" if strange else ""]
        return f"its names differ: it {' and '.join(filter(None, parts))} ({len(missing)} missing, {len(strange)} more)"
    for name, value in update.items():
        wanted = expected[name]
        if value.dtype != wanted.dtype:
            return f"{name!r} has type {value.dtype}, not {wanted.dtype}"
        if value.shape != wanted.shape:
            return f"{name!r} has shape {value.shape}, not {wanted.shape}"
    for name, value in update.items():
        if not np.isfinite(value).all():
            return f"{name!r} holds NaN or infinite values"
    return None


def unreal(update: Weights, weights: Weights) -> str | None:
    """Why running variances that an update leads to are none of any data; None where they may be.

    A variance isn't negative. Upwards nothing bounds it but the data, whose size no recipe says.

    Args:
        update: in good form (:func:`fault`).
        weights: the ones that it is added to.
    """
    for name, value in update.items():
        if not name.endswith("running_var") or not value.size:
            continue
        after = weights[name].astype(np.float64) + value
        rounding = 1e-6 + float(np.abs(value).max()) / 64  # of int8, sent twice, and of masked words
        if float(after.min()) < -rounding:
            return f"{name!r} would come to {float(after.min()):.4g}, and a variance isn't negative"
    return None


def norm(update: Mapping[str, npt.NDArray[Any]]) -> float:
    """The Euclidean length of all of an update."""
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in update.values()))


def usual_norm(norms: Sequence[float]) -> float | None:
    """The lower median of those that are not 0; None without any. Of two, the shorter: growth is what poisons."""
    moved = sorted(value for value in norms if value > 0)
    return moved[(len(moved) - 1) // 2] if moved else None


def beyond(length: float, farthest: float | None) -> str | None:
    """Why a first round's update of this length is none of honest training; None where it may be.

    Args:
        length: of :func:`norm`, over what gradients move.
        farthest: of :func:`medray.learn.aggregation.reach.reach`.
    """
    if farthest is None or length <= farthest:
        return None
    return (
        f"its norm {length:.4g} is above {farthest:.4g}, which is as far as this recipe's optimiser can move the "
        "weights in a first round"
    )


def too_long(length: float, usual: float | None, *, outlier: float, most: float | None) -> str | None:
    """Why an update of this length is refused; None where it is not.

    Args:
        length: of :func:`norm`.
        usual: of :func:`usual_norm`, over this round and the last ones.
        outlier: how many times the usual is too much.
        most: the absolute limit, None for none.
    """
    if most is not None and length > most:
        return f"its norm {length:.4g} is above federation.max_norm={most:.4g}"
    if usual is not None and length > outlier * usual:
        return (
            f"its norm {length:.4g} is {length / usual:.0f} times the usual {usual:.4g}, more than "
            f"federation.outlier={outlier:g}"
        )
    return None
