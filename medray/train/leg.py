"""A part of a longer training: one site's work in one round of a federation is a call of fit() of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Leg", "Rounds", "pull_towards"]


@dataclass(frozen=True)
class Leg:
    """Which part of the whole a call of fit() is; the learning rate's schedule spans all of them.

    Attributes:
        number: from 0.
        of: parts in all.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(f"leg {self.number} of {self.of} does not exist")


class Rounds:
    """A training loader of ``steps`` batches, that goes on in the next leg where it stopped in this one.

    Args:
        loader: of whole epochs.
        leg: which part.
        steps: batches in each leg; None: ``epochs`` passes.
        epochs: passes in each leg.
    """

    def __init__(self, loader: Any, leg: Leg, *, steps: int | None, epochs: int) -> None:
        self._loader = loader
        self._steps = steps if steps is not None else epochs * len(loader)
        self._first = leg.number * self._steps

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """fit() counts its own epochs; here a leg is one, whatever it holds."""

    def set_strength(self, strength: float) -> None:
        """As the loader's."""
        self._loader.set_strength(strength)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        length = len(self._loader)
        done = 0
        while done < self._steps:
            epoch, position = divmod(self._first + done, length)
            self._loader.set_epoch(epoch)
            for number, batch in enumerate(self._loader):
                if number < position:
                    continue
                yield batch
                done += 1
                if done == self._steps:
                    return


def pull_towards(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], anchors: Sequence[Tensor], mu: float
) -> None:
    """Let every step of ``optimizer`` use g + mu * (w - anchor) for g: FedProx (Li et al., MLSys 2020,
    arXiv:1812.06127).

    The term is added in the optimiser, not in the loss: privacy engines keep gradients of samples, and a term of the
    loss that no sample has would be lost. Added after clipping and noise it costs no privacy.

    Args:
        optimizer: that owns the parameters.
        parameters: which are pulled.
        anchors: where to, one for each, on the same device.
        mu: how strongly.
    """
    pairs = list(zip(parameters, anchors, strict=True))

    def add(*_: Any) -> None:
        with torch.no_grad():
            for parameter, anchor in pairs:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - anchor, alpha=mu)

    optimizer.register_step_pre_hook(add)
