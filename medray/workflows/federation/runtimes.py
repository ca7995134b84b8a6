"""What trains a site's round: the identity or DP-SGD, with an optimiser that goes on where the last round left it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from medray.config.privacy import PrivacyConfig
from medray.learn.aggregation.scaffold import attach_correction
from medray.learn.proximal import attach_proximal
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.runtime import PrivateRuntime
from medray.train.runtime import LocalRuntime, MakeOptimizer

__all__ = ["PrivateSiteRuntime", "SiteRuntime"]


class _Keeps(LocalRuntime):
    """A runtime whose optimiser goes on where the site's last round left it."""

    state: dict[str, Any] | None = None
    optimizer: torch.optim.Optimizer | None = None

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        """As the runtime's own."""

        def make(module: nn.Module) -> torch.optim.Optimizer:
            optimizer = make_optimizer(module)
            if self.state is not None:
                optimizer.load_state_dict(self.state)
            self.optimizer = optimizer
            return optimizer

        return super().prepare(model, make, train_loader)


class SiteRuntime(_Keeps):
    """Plain training.

    Args:
        device: where.
        mu: FedProx's; 0 for none.
        correction: SCAFFOLD's, of each step's gradient, by the parameter's name; none for others.
        optimizer: the optimiser's state after the last round; None begins anew.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        mu: float,
        correction: Mapping[str, torch.Tensor],
        optimizer: dict[str, Any] | None,
    ) -> None:
        super().__init__(device)
        self._mu, self._correction, self.state = mu, correction, optimizer

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        """As the runtime's own, with FedProx's pull, or SCAFFOLD's correction."""
        model, optimizer, train_loader = super().prepare(model, make_optimizer, train_loader)
        attach_proximal(optimizer, model, self._mu)
        attach_correction(optimizer, model, self._correction)
        return model, optimizer, train_loader


class PrivateSiteRuntime(_Keeps, PrivateRuntime):
    """Training under differential privacy; see :class:`medray.privacy.runtime.PrivateRuntime`."""

    def __init__(
        self, plan: PrivacyPlan, config: PrivacyConfig, *, mu: float, optimizer: dict[str, Any] | None, **how: Any
    ) -> None:
        PrivateRuntime.__init__(self, plan, config, proximal_mu=mu, **how)
        self.state = optimizer
