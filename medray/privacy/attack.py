"""Membership inference by the loss: can it be told from a network's losses which images it was trained on?

The attack of Yeom et al. (2018, arXiv:1709.01604): whoever has a low loss is taken for a member, at every threshold.
It is the weakest of its kind and needs no shadow networks; that it finds nothing proves nothing. What epsilon promises
holds against every attack: at a false-positive rate f no more than ``exp(epsilon) f + delta`` true positives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.errors import PrivacyError

__all__ = ["Attack", "membership_attack", "most_true_positives"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What the attack found; intervals of 95 %, by the bootstrap over members and others, or over their patients.

    Attributes:
        auc: .5 is guessing; members against others.
        true_positives: share of members found where one in ``1 / false_positives`` others is taken for one.
        false_positives: that rate.
        members, others: cases.
    """

    auc: float
    auc_low: float
    auc_high: float
    true_positives: float
    true_positives_low: float
    true_positives_high: float
    false_positives: float
    members: int
    others: int


def membership_attack(
    members: npt.ArrayLike,
    others: npt.ArrayLike,
    *,
    groups: tuple[Sequence[str], Sequence[str]] | None = None,
    false_positives: float = 0.01,
    resamples: int = 1000,
    seed: int = 0,
) -> Attack:
    """Attack a network by its losses.

    Args:
        members: (N,) losses of images that it was trained on.
        others: (M,) losses of images like them that it has never seen.
        groups: the patient of each member and of each other: a patient's images are drawn together in the bootstrap.
        false_positives: at which the true positives are told.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        PrivacyError: fewer than two of either, or losses that are NaN.
    """
    inside, outside = np.asarray(members, dtype=np.float64).ravel(), np.asarray(others, dtype=np.float64).ravel()
    if min(len(inside), len(outside)) < 2 or np.isnan(inside).any() or np.isnan(outside).any():
        raise PrivacyError(
            f"{len(inside)} losses of members and {len(outside)} of others: the attack needs two of each, none NaN"
        )
    rng = np.random.default_rng(seed)
    of_members, of_others = groups or (range(len(inside)), range(len(outside)))
    parts, rest = _by_group(inside, of_members), _by_group(outside, of_others)

    def again(measure: Callable[[Floats, Floats], float]) -> tuple[float, float]:
        found = [measure(_drawn(parts, rng), _drawn(rest, rng)) for _ in range(resamples)]
        low, high = np.quantile(found, [0.025, 0.975])
        return float(low), float(high)

    def tpr(a: Floats, b: Floats) -> float:
        return _true_positives(a, b, false_positives)

    auc_low, auc_high = again(_auc)
    tpr_low, tpr_high = again(tpr)
    return Attack(
        auc=_auc(inside, outside),
        auc_low=auc_low,
        auc_high=auc_high,
        true_positives=tpr(inside, outside),
        true_positives_low=tpr_low,
        true_positives_high=tpr_high,
        false_positives=false_positives,
        members=len(inside),
        others=len(outside),
    )


def most_true_positives(epsilon: float, delta: float, false_positives: float) -> float:
    """The most that any attack finds of members of an (epsilon, delta)-private training (Kairouz et al. 2015)."""
    grown = math.exp(min(epsilon, 700.0))
    return min(1.0, grown * false_positives + delta, 1 - (1 - delta - false_positives) / grown)


def _by_group(values: Floats, groups: Sequence[str] | Sequence[int]) -> list[Floats]:
    _, at = np.unique(np.asarray(groups), return_inverse=True)
    return [values[at == group] for group in range(int(at.max()) + 1)]


def _drawn(parts: list[Floats], rng: np.random.Generator) -> Floats:
    """As many groups as there are, by lot, with all that they hold."""
    return np.concatenate([parts[k] for k in rng.integers(len(parts), size=len(parts))])


def _auc(inside: Floats, outside: Floats) -> float:
    """Probability that a member's loss is below another's, ties by half."""
    ordered = np.sort(outside)
    above = len(ordered) - np.searchsorted(ordered, inside, side="right")
    equal = np.searchsorted(ordered, inside, side="right") - np.searchsorted(ordered, inside, side="left")
    return float((above + 0.5 * equal).mean() / len(ordered))


def _true_positives(inside: Floats, outside: Floats, rate: float) -> float:
    """Share of members below the largest threshold that at most ``rate`` of the others lie below."""
    allowed = math.floor(rate * len(outside))
    threshold = np.sort(outside)[allowed]  # as many others lie strictly below it
    return float((inside < threshold).mean())
