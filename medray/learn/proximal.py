"""FedProx's pull towards the global weights, inside the optimiser (Li et al. 2020, arXiv:1812.06127).

The term mu / 2 * |w - w_global|^2 has the gradient mu * (w - w_global). In a loss it is lost without a word where
gradients are taken sample by sample (opacus #249). Added by the optimiser, just before its own step, it acts with and
without differential privacy; there it comes after clipping and noise, sees no data, and costs no epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medray.errors import TrainingError

__all__ = ["attach_proximal"]


def attach_proximal(
    optimizer: torch.optim.Optimizer, model: nn.Module, mu: float, anchor: Mapping[str, Tensor] | None = None
) -> None:
    """Let every step of ``optimizer`` add ``mu * (w - w_global)`` to the gradient that it is handed.

    Args:
        optimizer: over parameters of ``model``.
        mu: strength, at least 0; 0 attaches nothing.
        anchor: w_global by parameter name, such as a state dict; None: the weights as they are now.

    Raises:
        TrainingError: a negative mu, or an anchor that lacks a parameter or has it in another shape.
    """
    if not (math.isfinite(mu) and mu >= 0):
        raise TrainingError(f"the proximal term's mu={mu} must be a finite number of at least 0")
    if mu == 0:
        return
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        there = parameter.detach() if anchor is None else anchor.get(name)
        if there is None or there.shape != parameter.shape:
            raise TrainingError(
                f"the global weights have no '{name}' of shape {tuple(parameter.shape)}: they are of another network"
            )
        pairs.append((parameter, there.detach().to(parameter).clone()))

    def pull(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, there in pairs:
                drift = mu * (parameter - there)
                parameter.grad = drift if parameter.grad is None else parameter.grad.add_(drift)

    optimizer.register_step_pre_hook(pull)
