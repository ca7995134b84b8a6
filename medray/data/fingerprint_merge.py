"""One fingerprint for several sites, from theirs alone: no image and no patient is looked at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from medray.data.fingerprint import ChannelStats, Fingerprint
from medray.errors import FederationError
from medray.tasks.catalogue import find_task

__all__ = ["merge_fingerprints"]


def merge_fingerprints(parts: Sequence[tuple[str, Fingerprint]]) -> Fingerprint:
    """What :func:`medray.data.fingerprint.measure` would find on all sites' cases together, as near as sums allow.

    Exact: counts, extremes, bytes, means and deviations. Near: medians (the sites' medians, each
    counting by its cases) and the outer percentiles (their means, counting likewise).

    Args:
        parts: site and its fingerprint.

    Raises:
        FederationError: a site's data have another task, axes, channels or classes; it is named.
    """
    name, first = parts[0]
    for other, found in parts[1:]:
        for what in ("task", "ndim", "channels", "classes", "columns"):
            mine, its = getattr(first, what), getattr(found, what)
            if mine != its:
                raise FederationError(
                    f"site {other}: its data have {what} {its}, those of site {name} {mine}. All sites need the same"
                )
    prints = [found for _, found in parts]
    cases = np.array([p.cases for p in prints], dtype=float)
    voxels = np.array([p.bytes_total / 4 / p.channels for p in prints])
    spaced = [(p, n) for p, n in zip(prints, cases, strict=True) if p.spacing_median is not None]
    balance = voxels if find_task(first.task).dense else cases
    return Fingerprint(
        task=first.task,
        ndim=first.ndim,
        channels=first.channels,
        modality=first.modality,
        classes=first.classes,
        cases=int(cases.sum()),
        patients=sum(p.patients for p in prints),
        sites={name: p.cases for name, p in parts},
        shape_min=_each(min, [p.shape_min for p in prints]),
        shape_median=tuple(round(v) for v in _median([p.shape_median for p in prints], cases)),
        shape_max=_each(max, [p.shape_max for p in prints]),
        spacing_min=_each(min, [p.spacing_min for p, _ in spaced]) if spaced else None,
        spacing_median=_median([p.spacing_median for p, _ in spaced], [n for _, n in spaced]) if spaced else None,
        spacing_max=_each(max, [p.spacing_max for p, _ in spaced]) if spaced else None,
        intensity=tuple(_channel([p.intensity[c] for p in prints]) for c in range(first.channels)),
        class_cases={c: sum(p.class_cases[c] for p in prints) for c in first.classes},
        class_fraction={
            c: float(np.average([p.class_fraction[c] for p in prints], weights=balance)) for c in first.classes
        },
        bytes_total=sum(p.bytes_total for p in prints),
        digest=hashlib.sha256("".join(p.digest for p in prints).encode()).hexdigest(),
        columns=first.columns,
    )


def _each(choose: Any, rows: Sequence[Any]) -> Any:
    return tuple(choose(column) for column in zip(*rows, strict=True))


def _median(rows: Sequence[Any], weights: Any) -> tuple[float, ...]:
    """Of each column, the value up to which half of the weight lies."""
    table, share = np.asarray(rows, dtype=float), np.asarray(weights, dtype=float)
    found = []
    for column in table.T:
        order = np.argsort(column, kind="stable")
        reached = np.cumsum(share[order])
        found.append(float(column[order][np.searchsorted(reached, reached[-1] / 2)]))
    return tuple(found)


def _channel(stats: Sequence[ChannelStats]) -> ChannelStats:
    weights = np.maximum([s.count for s in stats], 1e-9)
    means = np.array([s.mean for s in stats])
    mean = float(np.average(means, weights=weights))
    squares = np.array([s.std**2 + s.mean**2 for s in stats])
    return ChannelStats(
        mean=mean,
        std=math.sqrt(max(float(np.average(squares, weights=weights)) - mean**2, 0.0)),
        p005=float(np.average([s.p005 for s in stats], weights=weights)),
        p50=_median([[s.p50] for s in stats], weights)[0],
        p995=float(np.average([s.p995 for s in stats], weights=weights)),
        count=sum(s.count for s in stats),
    )
