"""Poisson samples of training cases, as differential privacy counts on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from medray.errors import ConfigError

__all__ = ["Lot", "Lots", "Poisson"]

Lot = tuple[tuple[int, ...], int]
"""Positions of the cases that a batch holds, and the seed of what is random about it."""


class Lots(Protocol):
    """A source of random numbers that Poisson samples are drawn from."""

    def lots(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Which of ``count`` units are drawn, each with probability ``rate`` by itself."""

    def seed(self) -> int:
        """Any number from 0 to 2^63 - 1."""


class Poisson:
    """Draws the lots of batches: each holds a unit with probability ``rate``, whatever else it holds.

    Args:
        rate: above 0, at most 1.
        source: of random numbers.
        cases: how many there are.
        groups: the unit of each case, in their order: a lot has one case, any, of each unit drawn. None for cases by
            themselves.

    Attributes:
        units: what lots are drawn of: groups, or cases.
    """

    def __init__(self, rate: float, source: Lots, cases: int, groups: Sequence[Hashable] | None) -> None:
        if not 0 < rate <= 1:
            raise ConfigError(f"the sample rate {rate} must be above 0 and at most 1: train.batch_size over the cases")
        self.rate, self.source = rate, source
        self._groups: list[list[int]] | None = None
        if groups is not None:
            members: dict[Hashable, list[int]] = {}
            for position, group in enumerate(groups):
                members.setdefault(group, []).append(position)
            self._groups = list(members.values())
        self.units = cases if self._groups is None else len(self._groups)

    def draw(self) -> Lot:
        """One batch's."""
        drawn, seed = self.source.lots(self.units, self.rate).tolist(), self.source.seed()
        if self._groups is not None:
            rng = np.random.default_rng(seed)
            drawn = [self._groups[unit][int(rng.integers(len(self._groups[unit])))] for unit in drawn]
        return tuple(drawn), seed
