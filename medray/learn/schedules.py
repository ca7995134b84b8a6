"""Learning-rate schedules: factors of ``optim.lr`` by progress, so that a run whose length is found on the way can use
them."""

from __future__ import annotations

import math
from typing import Any, Literal

from medray.config.schema import ScheduleConfig

__all__ = ["Schedule", "shape"]


def shape(config: ScheduleConfig, progress: float) -> float:
    """The factor at ``progress`` (0 first, 1 last) of what follows the warm-up; in min_factor..1.

    cosine, and warm_restarts with cycles that double in length: Loshchilov and Hutter 2017 (arXiv:1608.03983);
    cyclic, triangular: Smith 2017 (arXiv:1506.01186); poly, power 0.9: Chen et al. 2018 (arXiv:1606.00915), as nnU-Net.
    """
    progress = min(max(progress, 0.0), 1.0)
    if config.name in ("constant", "plateau"):
        return 1.0
    if config.name == "poly":
        height = (1 - progress) ** 0.9
    elif config.name == "cyclic":
        phase = progress * config.cycles
        height = 1 - abs(2 * (phase - math.floor(phase)) - 1) if progress < 1 else 0.0
    else:
        if config.name == "warm_restarts" and progress < 1:
            # Cycle k spans [2^k - 1, 2^(k+1) - 1] of 2^cycles - 1 units.
            unit = progress * (2**config.cycles - 1)
            cycle = math.floor(math.log2(unit + 1))
            progress = (unit + 1 - 2**cycle) / 2**cycle
        height = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_factor + (1 - config.min_factor) * height


class Schedule:
    """The factor for each step; ``plateau`` also listens to validations.

    Args:
        config: the schedule.
        mode: which way the validated objective improves.
    """

    def __init__(self, config: ScheduleConfig, mode: Literal["max", "min"] = "max") -> None:
        self.config, self.mode = config, mode
        self._best: float | None = None
        self._waited = 0
        self._cut = 1.0

    def factor(self, step: int, total: int) -> float:
        """The factor of the learning rate for ``step`` (0-based) of ``total``."""
        warm = round(self.config.warmup * total)
        if step < warm:
            return (step + 1) / warm * shape(self.config, 0.0) * self._cut
        progress = (step - warm) / max(1, total - 1 - warm)
        return shape(self.config, progress) * self._cut

    def observe(self, value: float) -> None:
        """Tell a validation's objective: after ``patience`` without gain, ``plateau`` halves the rate, down to
        min_factor."""
        if self.config.name != "plateau":
            return
        if not math.isnan(value) and (
            self._best is None or (value > self._best if self.mode == "max" else value < self._best)
        ):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self.config.patience:
            self._cut, self._waited = max(self._cut / 2, self.config.min_factor), 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {"best": self._best, "waited": self._waited, "cut": self._cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._best, self._waited, self._cut = state["best"], state["waited"], state["cut"]
