"""Optimisers, with weight decay on matrices and kernels alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medray.config.schema import OptimConfig

__all__ = ["build_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as [decayed, not decayed]; an empty group is left out.

    Not decayed: what has one axis or none (biases, scales of norms), and what the model names in
    ``no_weight_decay()``, as timm's transformers do for tokens and position embeddings.
    """
    named = getattr(model, "no_weight_decay", None)
    spared: set[str] = set(named()) if callable(named) else set()
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name in spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, over the model's trainable parameters, on whatever device they lie.

    Adam's decay is L2 regularisation, AdamW's is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101), SGD has
    Nesterov momentum where ``momentum`` > 0.
    """
    groups = parameter_groups(model, config.weight_decay)
    # One fused kernel over all parameters: 2 to 4 times faster than the loop on CPU, and the default loop is what
    # remains elsewhere.
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= {"cpu", "cuda"}
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=fused)
