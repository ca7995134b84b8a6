"""From the updates of one round to the next global weights, by the strategy that the configuration names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, cast

import numpy as np

from medray.config.federation import FederationConfig
from medray.learn.aggregation.adaptive import Moments, adaptive_step
from medray.learn.aggregation.mean import Weights, mean
from medray.learn.aggregation.robust import krum, median, trimmed_mean
from medray.learn.aggregation.scaffold import control_of

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
        self._moments = Moments({}, {})
        self._controls: dict[str, Weights] = {}
        self._counted: dict[str, float] = {}
        self._control = Weights()

    def correction(self, weights: Weights, site: str) -> Weights:
        """SCAFFOLD's c - c_i, which a site adds to its gradients, for each parameter; empty under other strategies."""
        if self._config.strategy != "scaffold":
            return {}
        own = self._controls.get(site)
        return {
            name: np.zeros_like(value) if own is None else (self._control[name] - own[name]).astype(value.dtype)
            for name, value in weights.items()
            if name not in self._statistics
        }

    def __call__(
        self,
        weights: Weights,
        updates: Sequence[Weights],
        counts: Sequence[float],
        *,
        sites: Sequence[str] = (),
        travelled: float = 1.0,
    ) -> Weights:
        """The next global weights.

        Args:
            weights: the ones that the sites began with.
            updates: what each of N >= 1 sites would add to them; alike in names and shapes, finite.
            counts: training cases of each.
            sites: scaffold: whose they are.
            travelled: scaffold: the sum of the round's learning rates at a site.

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
        if config.strategy == "scaffold" and travelled > 0:  # a schedule that has come to nothing tells of no gradient
            for site, update, count in zip(sites, updates, counts, strict=True):
                self._controls[site] = control_of(self.correction(weights, site), update, travelled)
                self._counted[site] = float(count)
            self._settle()
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

    def _settle(self) -> None:
        """c of all that is known of the sites."""
        names = sorted(self._controls)
        self._control = mean([self._controls[name] for name in names], [self._counted[name] for name in names])

    def state(self) -> Weights:
        """What a checkpoint has to keep: arrays by name; empty where the strategy has no memory."""
        moments = self._moments
        first = {f"first/{name}": value for name, value in moments.first.items()}
        second = {f"second/{name}": value for name, value in moments.second.items()}
        controls = {
            f"control/{site}/{name}": value for site, own in self._controls.items() for name, value in own.items()
        }
        counted = {f"counted/{site}": np.array(count) for site, count in self._counted.items()}
        return {**first, **second, **controls, **counted}

    def load_state(self, state: Weights) -> None:
        """Go on from :meth:`state`."""
        parts = {
            part: {name.removeprefix(f"{part}/"): value for name, value in state.items() if name.startswith(f"{part}/")}
            for part in ("first", "second", "control", "counted")
        }
        self._moments = Moments(parts["first"], parts["second"])
        self._counted = {site: float(value) for site, value in parts["counted"].items()}
        self._controls = {site: {} for site in self._counted}
        for key, value in parts["control"].items():
            site, _, name = key.rpartition("/")  # a site's name may have a slash, a weight's has none
            self._controls[site][name] = value
        if self._controls:
            self._settle()
