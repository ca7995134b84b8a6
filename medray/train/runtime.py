"""Runtime: the seam between fit() and whatever runs it (one process, Ray Train, DP).

Several processes may train one model together. fit() neither knows how many nor which it is: it asks for its share of
a list, for sums, and for what all agree on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Sums = dict[str, npt.NDArray[np.float64]]
T = TypeVar("T")


class Runtime(Protocol):
    """What fit() asks of its surroundings. The identity is :class:`LocalRuntime`."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and logs."""

    @property
    def device(self) -> torch.device:
        """Where the model and batches lie."""

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        """Move and wrap the model, build its optimiser, shard the loader."""

    def criterion(self, loss: nn.Module) -> nn.Module:
        """The loss as this runtime needs it (per sample under DP)."""

    @property
    def is_alone(self) -> bool:
        """Whether no other process trains this model: what only this one saw may then change what it does."""

    @property
    def lane(self) -> int:
        """Which of the random streams this process draws from; 0 for the main one."""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process works on; each is some process's, and no two have the same."""

    def reduce(self, metric_state: Mapping[str, npt.ArrayLike]) -> Sums:
        """Sum the sufficient statistics of metrics over all processes, element by element, in float64."""

    def from_main(self, value: T) -> T:
        """The main process's value, on all."""

    def align(self, model: nn.Module) -> None:
        """Give all processes the main one's buffers (running statistics), before they judge the model together."""

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised the flag: early stop and deadline are alike on all ranks."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hold gradient exchange back while micro-batches accumulate."""


class LocalRuntime:
    """One process, one device: nothing to share."""

    is_main = True
    is_alone = True
    lane = 0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        model = model.to(self.device)
        return model, make_optimizer(model), train_loader

    def criterion(self, loss: nn.Module) -> nn.Module:
        return loss.to(self.device)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items

    def reduce(self, metric_state: Mapping[str, npt.ArrayLike]) -> Sums:
        return {key: np.asarray(value, dtype=np.float64) for key, value in metric_state.items()}

    def from_main(self, value: T) -> T:
        return value

    def align(self, model: nn.Module) -> None:
        pass

    def agree(self, flag: bool) -> bool:
        return flag

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()
