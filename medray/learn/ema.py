"""The moving average of a model's weights (Polyak averaging)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """Exponential moving average of parameters; buffers (batch norm's statistics, counters) are copied as they are.

    The decay warms up as (1 + n) / (10 + n), so that a short run's average isn't dominated by its random start.

    Args:
        model: the module to follow, on its final device.
        decay: in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after one optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(model.named_parameters())
        averages = [self._shadow[name] for name in parameters]
        torch._foreach_lerp_(averages, [p.detach() for p in parameters.values()], 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within it, the model carries the averages; afterwards its own weights again, bit for bit."""
        parameters = dict(model.named_parameters())
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    def _swap(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.data, self._shadow[name] = self._shadow[name], parameter.data

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """What a checkpoint has to keep."""
        return {"updates": self.updates, "shadow": self._shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        """Go on from :meth:`state_dict`."""
        shadow = state["shadow"]
        if (
            not isinstance(shadow, dict)
            or not isinstance(state["updates"], int)
            or shadow.keys() != self._shadow.keys()
        ):
            raise ValueError("this state belongs to another model")
        self.updates = state["updates"]
        for name, value in shadow.items():
            self._shadow[name].copy_(value)
