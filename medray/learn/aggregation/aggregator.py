"""From the updates of one round to the next global weights, by the strategy that the configuration names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, cast

import numpy as np

from medray.config.federation import FederationConfig
from medray.learn.aggregation.adaptive import Moments, adaptive_step
from medray.learn.aggregation.mean import Weights, mean
from medray.learn.aggregation.robust import krum, median, trimmed_mean
from medray.learn.aggregation.scaffold import moved_control

__all__ = ["Aggregator"]

_ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")


class Aggregator:
    """Applies a strategy, round after round.

    Args:
        config: the strategy and its numbers.
        statistics: names of what is no parameter (running means): it is averaged, never stepped adaptively.
    """

    def __init__(self, config: FederationConfig, statistics: Collection[str] = ()) -> None:
        self._config, self._statistics = config, frozenset(statistics)
        self._moments, self._control = Moments({}, {}), Weights()

    def control(self, weights: Weights) -> Weights:
        """SCAFFOLD's control variate c, for each parameter among ``weights``; empty under other strategies."""
        if self._config.strategy != "scaffold":
            return {}
        return {
            name: self._control.get(name, np.zeros_like(value))
            for name, value in weights.items()
            if name not in self._statistics
        }

    def __call__(
        self,
        weights: Weights,
        updates: Sequence[Weights],
        counts: Sequence[float],
        *,
        travelled: float = 1.0,
        share: float = 1.0,
    ) -> Weights:
        """The next global weights.

        Args:
            weights: the ones that the sites began with.
            updates: what each of N >= 1 sites would add to them; alike in names and shapes, finite.
            counts: training cases of each.
            travelled: scaffold: the sum of the round's learning rates at a site.
            share: scaffold: of all sites, those whose updates these are.

        Raises:
            FederationError: krum with too few updates.
        """
        config = self._config
        if config.strategy == "median":
            step = median(updates)
        elif config.strategy == "trimmed_mean":
            step = trimmed_mean(updates, config.trim)
        elif config.strategy == "krum":
            step = updates[krum(updates, config.byzantine)]
        else:
            step = mean(updates, counts)
        if config.strategy == "scaffold":
            control = self.control(weights)
            moved = moved_control({}, control, step, travelled)
            self._control = {name: (value + share * moved[name]).astype(value.dtype) for name, value in control.items()}
        if config.strategy in _ADAPTIVE:
            stepped, self._moments = adaptive_step(
                {name: value for name, value in step.items() if name not in self._statistics},
                self._moments,
                rule=cast(Literal["fedadam", "fedyogi", "fedadagrad"], config.strategy),
                lr=config.server_lr,
                beta1=config.beta1,
                beta2=config.beta2,
                tau=config.tau,
            )
            step = {**step, **stepped}
        return {name: (value + step[name]).astype(value.dtype) for name, value in weights.items()}

    def state(self) -> Weights:
        """What a checkpoint has to keep: arrays by name; empty where the strategy has no memory."""
        moments = self._moments
        first = {f"first/{name}": value for name, value in moments.first.items()}
        second = {f"second/{name}": value for name, value in moments.second.items()}
        return {**first, **second, **{f"control/{name}": value for name, value in self._control.items()}}

    def load_state(self, state: Weights) -> None:
        """Go on from :meth:`state`."""
        parts = {
            part: {name.removeprefix(f"{part}/"): value for name, value in state.items() if name.startswith(f"{part}/")}
            for part in ("first", "second", "control")
        }
        self._moments, self._control = Moments(parts["first"], parts["second"]), parts["control"]
