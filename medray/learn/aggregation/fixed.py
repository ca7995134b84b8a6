"""Updates as whole numbers modulo 2^32 or 2^64: what is masked and summed where only the sum may be seen.

An entry becomes ``round(entry / step)``, within ``reach``; a site counts by a whole number of at most ``heaviest``. The
step is the smallest power of two with which the sum of ``sites`` such numbers, each times its weight, can't leave
[-2^(bits-1), 2^(bits-1)): nothing ever wraps around, so that the sum modulo 2^bits is the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.config.federation import HEAVIEST_SITE as HEAVIEST
from medray.errors import FederationError
from medray.learn.aggregation.mean import Weights

__all__ = ["HEAVIEST", "Codes", "FixedPoint", "fixed_point", "flat", "shaped"]

REACH_ALIKE, REACH_WEIGHTED = 16.0, 4096.0
"""Largest entry of an update: far beyond what weights move by in a round; running variances may move further."""

Codes = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """How numbers become codes.

    Attributes:
        bits: 32 or 64; codes are unsigned words of so many.
        step: of an entry, a power of two.
        reach: largest entry; what is beyond is clipped.
        heaviest: largest weight of a site.
    """

    bits: int
    step: float
    reach: float
    heaviest: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of codes, little-endian."""
        return np.dtype(f"<u{self.bits // 8}")

    def encode(self, values: npt.NDArray[Any], weight: int) -> Codes:
        """(D,) finite floats times ``weight``, and the weight itself behind them: (D + 1,) codes."""
        if not 1 <= weight <= self.heaviest:
            raise FederationError(f"a site can't count for {weight}: it must be from 1 to {self.heaviest}")
        whole = np.rint(np.clip(values.astype(np.float64), -self.reach, self.reach) / self.step).astype(np.int64)
        return np.concatenate([whole * weight, [weight]]).astype(np.int64).view(np.uint64).astype(self.dtype)

    def decode(self, codes: Codes, *, sites: int) -> tuple[npt.NDArray[np.float64], int] | None:
        """The weighted mean of what ``sites`` sites encoded, (D,), and their weights' sum.

        None where that sum is none: masks that didn't cancel leave numbers by lot.
        """
        signed = np.dtype(f"<i{self.bits // 8}")
        whole = codes.astype(self.dtype).view(signed).astype(np.int64)
        weights = int(whole[-1])
        if not sites <= weights <= sites * self.heaviest:
            return None
        return whole[:-1].astype(np.float64) * (self.step / weights), weights


def fixed_point(*, sites: int, alike: bool, heaviest: int = HEAVIEST) -> FixedPoint:
    """The finest codes for so many sites.

    Args:
        sites: that may be summed.
        alike: all sites count for one, which 32 bits are enough for; else by their cases.
        heaviest: cases that a site counts for at most.

    Raises:
        FederationError: so many sites that steps would be too coarse for training.
    """
    bits, reach, heaviest = (32, REACH_ALIKE, 1) if alike else (64, REACH_WEIGHTED, heaviest)
    # rint(reach / step) <= largest, since both are powers of two, and sites * heaviest * largest < 2^(bits - 1).
    largest = 2 ** math.floor(math.log2(((1 << bits - 1) - 1) // (sites * heaviest)))
    step = reach / largest
    if step > 2.0**-14:
        raise FederationError(f"{sites} sites are too many for sums of {bits} bits. Ask fewer of them in a round")
    return FixedPoint(bits=bits, step=step, reach=reach, heaviest=heaviest)


def flat(update: Weights) -> npt.NDArray[np.float64]:
    """All entries in one row, (D,), by sorted names."""
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


def shaped(row: npt.NDArray[np.float64], like: Weights) -> Weights:
    """:func:`flat` undone, in the shapes and types of ``like``."""
    found, at = {}, 0
    for name in sorted(like):
        value = like[name]
        found[name] = row[at : at + value.size].reshape(value.shape).astype(value.dtype)
        at += value.size
    return {name: found[name] for name in like}
