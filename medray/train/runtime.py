"""Runtime: the seam between fit() and whatever runs it (one process, Ray Train, DP)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


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

    def reduce(self, metric_state: dict[str, float]) -> dict[str, float]:
        """Sum the sufficient statistics of metrics over all ranks."""

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised the flag: early stop and deadline are alike on all ranks."""

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Hold gradient exchange back while micro-batches accumulate."""


class LocalRuntime:
    """One process, one device: nothing to share."""

    is_main = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        model = model.to(self.device)
        return model, make_optimizer(model), train_loader

    def criterion(self, loss: nn.Module) -> nn.Module:
        return loss.to(self.device)

    def reduce(self, metric_state: dict[str, float]) -> dict[str, float]:
        return metric_state

    def agree(self, flag: bool) -> bool:
        return flag

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()
