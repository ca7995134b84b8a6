"""Group normalisation in place of batch normalisation, whose statistics tie the samples of a batch together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["group_norms", "has_batch_norm"]

GROUPS = 32
"""At most; as in Wu and He 2018 (arXiv:1803.08494)."""


class GroupNormAct(nn.GroupNorm):
    """Group normalisation, then what a timm layer of norm and activation does after it."""

    def __init__(self, channels: int, eps: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(_groups(channels), channels, eps)
        self.drop, self.act = drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer normalises over the batch, or keeps running statistics."""
    return any(
        isinstance(part, _BatchNorm) or getattr(part, "track_running_stats", False) is True for part in model.modules()
    )


def group_norms(model: nn.Module) -> nn.Module:
    """Replace every batch normalisation of ``model``, in place; scales and shifts keep their values, names and device.

    What is trained is what is built again from the same configuration, in a bundle too.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _twin(child))
    return _twin(model) if isinstance(model, _BatchNorm) else model


def _twin(norm: _BatchNorm) -> nn.Module:
    channels, eps = norm.num_features, norm.eps
    act = getattr(norm, "act", None)
    twin: Any
    if isinstance(act, nn.Module):  # timm's BatchNormAct2d
        drop = getattr(norm, "drop", None)
        twin = GroupNormAct(channels, eps, drop if isinstance(drop, nn.Module) else nn.Identity(), act)
    else:
        twin = nn.GroupNorm(_groups(channels), channels, eps, affine=norm.affine)
    if norm.affine:
        twin.weight, twin.bias = norm.weight, norm.bias
    return twin.train(norm.training)


def _groups(channels: int) -> int:
    """The most groups, a power of two up to GROUPS, that divide the channels into at least four each."""
    groups = math.gcd(channels, GROUPS)
    while groups > 1 and channels // groups < 4:
        groups //= 2
    return groups
