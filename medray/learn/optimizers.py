"""Optimisers, with weight decay on matrices and kernels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medray.config.schema import OptimConfig

__all__ = ["build_optimizer", "parameter_groups"]


Blocks = Sequence[Sequence[nn.Parameter]]


def parameter_groups(
    model: nn.Module, weight_decay: float, *, blocks: Blocks = (), layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters as [decayed, not decayed]; an empty group is left out.

    With ``blocks``, from the image on, there are such groups for each: the last of n learns at ``layer_decay`` times
    the rate of all that is in none of them, the first at its n-th power (Bao et al. 2022, arXiv:2106.08254). A group's
    "scale" is that factor; the first group's is the largest.

    Not decayed: what has one axis or none (biases, scales of norms), and what the model names in
    ``no_weight_decay()``, as timm's transformers do for tokens and position embeddings.
    """
    named = getattr(model, "no_weight_decay", None)
    spared: set[str] = set(named()) if callable(named) else set()
    above = {id(parameter): len(blocks) - depth for depth, block in enumerate(blocks) for parameter in block}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name in spared
            groups.setdefault((above.get(id(parameter), 0), free), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay, "scale": layer_decay ** key[0]}
        for key in sorted(groups)
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, *, blocks: Blocks = ()) -> torch.optim.Optimizer:
    """The optimiser that ``config`` names, over the model's trainable parameters, on whatever device they lie.

    ``blocks`` are the encoder's, for ``config.layer_decay``: see :func:`parameter_groups`.

    Adam's decay is L2 regularisation, AdamW's is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101), SGD has
    Nesterov momentum where ``momentum`` > 0.
    """
    groups = parameter_groups(model, config.weight_decay, blocks=blocks, layer_decay=config.layer_decay)
    groups = [group | {"lr": config.lr * group["scale"]} for group in groups]
    # One fused kernel over all parameters: 2 to 4 times faster than the loop on CPU, and the default loop is what
    # remains elsewhere.
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= {"cpu", "cuda"}
    if config.name == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=fused)
