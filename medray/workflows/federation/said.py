"""What a site says beside its update, which nobody can check: what is taken for figures, and how far they count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FIGURES", "counts", "mean_metrics", "odd", "stated"]

LARGEST = 1e100
"""Figures beyond it are nobody's; sums of these can't overflow."""
FIGURES = ("cases", "steps", "loss", "seconds", "metrics", "judged")
"""What a site may say beside its update."""
MOST_FIGURES, LONGEST_NAME = 100, 100
MOST_TIMES = 10.0
"""How many times the usual number of cases a site may count for: nobody can check what it says of itself."""


def odd(text: Mapping[str, Any]) -> str | None:
    """What is wrong with the figures that come with an update; they are a stranger's."""
    metrics = text.get("metrics", {})
    if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
        return "its metrics are no finite numbers"
    if len(metrics) > MOST_FIGURES or not all(n.isprintable() and len(n) <= LONGEST_NAME for n in metrics):
        return f"its metrics are more than {MOST_FIGURES}, or their names are none"
    if not all(text.get(key) is None or _is_number(text[key]) for key in ("loss", "seconds", "steps")):
        return "its loss, seconds or steps are no finite numbers"
    for key in ("cases", "judged"):
        value = text.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1_000_000_000:
            shown = value if _is_number(value) else f"a {type(value).__name__}"
            return f"its number of cases ({key}={shown}) is none"
    return None


def _is_number(value: object) -> bool:
    """Comparing holds for whole numbers of any length, which are no floats."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def counts(answers: Sequence[Mapping[str, Any]], *, private: bool) -> list[float]:
    """What each site counts for in the mean: its training cases, as it states them, within a bound.

    Under privacy no site states them, and one that did would count for more than all others: all count alike.
    """
    if private:
        return [1.0] * len(answers)
    return [float(count) for count in _bounded([max(1.0, float(text.get("cases", 1))) for text in answers])]


def stated(steps: Sequence[float | None]) -> list[int | None]:
    """Optimiser steps that sites say they made, within the same bound; None of a site that says nothing."""
    told = iter(_bounded([max(1.0, float(count)) for count in steps if count is not None]))
    return [None if count is None else math.ceil(next(told)) for count in steps]


def _bounded(numbers: Sequence[float]) -> list[float]:
    """None above :data:`MOST_TIMES` the median, of two in the middle the smaller: growth is what poisons."""
    if not numbers:
        return []
    most = MOST_TIMES * sorted(numbers)[(len(numbers) - 1) // 2]
    return [min(number, most) for number in numbers]


def mean_metrics(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean over sites, each counting by its validation cases, of each metric."""
    sums: dict[str, tuple[float, float]] = {}
    for _, text in sorted(answers.items()):
        share = float(text.get("judged") or 0)
        for name, value in (text.get("metrics") or {}).items():
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = (total + share * float(value), weight + share)
    return {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
