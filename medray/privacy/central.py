"""Differential privacy of whole sites, by noise at the server (McMahan et al. 2018, arXiv:1710.06963).

Each round releases the mean of the sites' updates, each clipped to norm C, plus Gaussian noise. Neighbours differ in
one site, whose update is replaced by none: who takes part is no secret, so that the mean's divisor isn't either. Every
site counts as taking part in every round: a share of them asked at a time makes it no cheaper here.

C follows a quantile of the updates' norms (Andrew et al., NeurIPS 2021, arXiv:1905.03871): with the noised share b of
updates that weren't longer than C, C becomes C * exp(-rate * (b - quantile)): it falls while more fit than should. Of
the noise's budget, the share takes :data:`COUNT_SHARE`: with noise z_u of the updates and s of the centred counts
(sensitivity 1/2), both together cost what one Gaussian of z does where z^-2 = z_u^-2 + (2 s)^-2 (their theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.config.federation import CentralPrivacyConfig
from medray.errors import PrivacyError
from medray.privacy.accountant import Accountant, epsilon, noise_multiplier
from medray.privacy.noise import SecureRandom

__all__ = ["Central", "CentralPlan", "clipped", "plan_central"]

COUNT_SHARE = 0.05
Row = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CentralPlan:
    """Noise of a whole run.

    Attributes:
        noise_multiplier: of a round, updates and counts together, over their sensitivity.
        updates: of the updates alone, over C.
        counts: standard deviation of the noise on the count; None where C stays as it is.
        rounds: of the run.
        epsilon, delta, accountant: what all rounds cost, for one site.
    """

    noise_multiplier: float
    updates: float
    counts: float | None
    rounds: int
    epsilon: float
    delta: float
    accountant: Accountant


def plan_central(config: CentralPrivacyConfig, rounds: int) -> CentralPlan:
    """The least noise that holds the target over all rounds.

    Raises:
        PrivacyError: no target, or one that can't be held.
    """
    if config.epsilon is None:
        raise PrivacyError("federation.privacy.epsilon is null, so there is nothing to plan; set a target")
    z = noise_multiplier(config.epsilon, config.delta, rate=1.0, steps=rounds)
    spent = epsilon([(z, 1.0, rounds)], config.delta)
    share = COUNT_SHARE if config.adaptive else 0.0
    return CentralPlan(
        noise_multiplier=z,
        updates=z / math.sqrt(1 - share),
        counts=z / math.sqrt(share) / 2 if config.adaptive else None,
        rounds=rounds,
        epsilon=spent.epsilon,
        delta=config.delta,
        accountant=spent.accountant,
    )


def clipped(row: Row, norm: float) -> tuple[Row, bool]:
    """A row of norm ``norm`` at most, and whether it was no longer before."""
    length = float(np.linalg.norm(row))
    return (row, True) if length <= norm else (row * (norm / length), False)


class Central:
    """The mechanism of one run, round after round.

    Args:
        config: with an epsilon.
        rounds: of the run; a further one is refused.
    """

    def __init__(self, config: CentralPrivacyConfig, rounds: int) -> None:
        self.config, self.plan = config, plan_central(config, rounds)
        self.clip, self.released = config.clip_norm, 0
        self._random = SecureRandom()

    def mean(self, updates: Sequence[Row]) -> Row:
        """The noised mean of updates, (D,) each, which are clipped here."""
        pairs = [clipped(update, self.clip) for update in updates]
        total = np.sum([row for row, _ in pairs], axis=0)
        return self.mean_of(total, sum(0.5 if inside else -0.5 for _, inside in pairs), len(pairs))

    def mean_of(self, total: Row, inside: float, sites: int) -> Row:
        """The noised mean, where the sum alone is known; C moves for the next round.

        Args:
            total: (D,) sum of updates that their sites clipped to :attr:`clip`; a longer one is cut to what all may.
            inside: sum over sites of 1/2 where nothing had to be clipped, else -1/2; within what so many can give.
            sites: how many.

        Raises:
            PrivacyError: more rounds than the noise was planned for.
        """
        if self.released >= self.plan.rounds:
            raise PrivacyError(f"round {self.released + 1} is beyond the {self.plan.rounds} that noise was planned for")
        self.released += 1
        # Under masks nobody has looked whether each site clipped: one that didn't moves no more than all may together.
        total = clipped(total, sites * self.clip)[0]
        inside = min(max(inside, -sites / 2), sites / 2)
        noised = total + self.plan.updates * self.clip * self._random.normal(total.size)
        if self.plan.counts is not None:
            share = (inside + self.plan.counts * float(self._random.normal(1)[0])) / sites + 0.5
            # Bounded, which noise doesn't see: among few sites it would move C by orders of magnitude.
            self.clip *= math.exp(-self.config.rate * (min(max(share, 0.0), 1.0) - self.config.quantile))
        return noised / sites

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint has to keep."""
        return {"clip": np.array([self.clip]), "released": np.array([self.released], np.int64)}

    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Go on from :meth:`state`; nothing where there is none."""
        if state:
            self.clip, self.released = float(state["clip"][0]), int(state["released"][0])
