"""Dropout of feature maps by kind, and stochastic depth in vendors' residual blocks that have none.

Nothing here has parameters, and no parameter changes its name: weights fit whatever was dropped when they were learnt.

Shape legend: x is (B, C, *spatial) with two or three spatial axes.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.models.layers import DROPOUT, DropPath

__all__ = ["Kind", "MapDropout", "add_drop_path", "drop_after", "set_dropout_kind"]

Kind = Literal["standard", "spatial", "channel"]


class MapDropout(nn.Module):
    """Dropout of feature maps, whose neighbouring values say almost the same.

    standard: single values (Srivastava et al. 2014). channel: whole channels of a sample (Tompson et al. 2015,
    arXiv:1411.4280, who call it spatial). spatial: places, with all channels of one. What is left is scaled up, so that
    the mean stays.
    """

    def __init__(self, p: float, kind: Kind) -> None:
        super().__init__()
        self.p, self.kind = p, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        if self.kind == "standard":
            return F.dropout(x, self.p)
        one = [1] * (x.ndim - 2)
        shape = (len(x), 1, *x.shape[2:]) if self.kind == "spatial" else (len(x), x.shape[1], *one)
        keep = 1.0 - self.p
        mask = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"p={self.p}, {self.kind}"


def set_dropout_kind(model: nn.Module, kind: Kind) -> None:
    """Put dropout of that kind wherever ``model`` drops channels of its maps, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.Dropout2d, nn.Dropout3d)):
                setattr(parent, name, MapDropout(child.p, kind))


def drop_after(parent: nn.Sequential, index: int, p: float, ndim: int = 2) -> None:
    """Follow a part without parameters (an activation) by channel dropout, in place; nothing where ``p`` is 0."""
    if p:
        parent[index] = nn.Sequential(parent[index], DROPOUT[ndim](p))


def add_drop_path(model: nn.Module, rate: float) -> nn.Module:
    """Give the residual blocks of MONAI's ResNet and SegResNet, and of timm's HRNet, stochastic depth, in place.

    The rate rises linearly from nothing at the first block to ``rate`` at the last (Huang et al. 2016).
    """
    from monai.networks.blocks.segresnet_block import ResBlock
    from monai.networks.nets.resnet import ResNetBlock, ResNetBottleneck
    from timm.models.resnet import BasicBlock, Bottleneck

    swaps: dict[type[nn.Module], Any] = {
        ResBlock: _PreActivated,
        ResNetBlock: _Basic,
        ResNetBottleneck: _Bottleneck,
    }
    blocks = [part for part in model.modules() if type(part) in (*swaps, BasicBlock, Bottleneck)]
    for number, block in enumerate(blocks):
        p = rate * number / max(1, len(blocks) - 1)
        if p == 0.0:
            continue
        cast("Any", block).drop_path = DropPath(p)  # timm's blocks look for it themselves
        mixin = swaps.get(type(block))
        if mixin is not None:
            block.__class__ = _mixed(mixin, type(block))
    return model


_MIXED: dict[tuple[type, type], type] = {}


def _mixed(mixin: Any, plain: Any) -> Any:
    """The class of blocks of class ``plain`` with ``mixin``'s way through them; their state is untouched."""
    if (mixin, plain) not in _MIXED:
        _MIXED[mixin, plain] = type(plain.__name__, (mixin, plain), {"__module__": plain.__module__})
    return _MIXED[mixin, plain]


class _PreActivated(nn.Module):
    """SegResNet's: nothing follows the sum, so that the branch is what the block adds."""

    def forward(self, x: Tensor) -> Tensor:
        block = cast("Any", self)
        y = block.conv1(block.act(block.norm1(x)))
        y = block.conv2(block.act(block.norm2(y)))
        return x + block.drop_path(y)


class _Basic(nn.Module):
    """MONAI's two convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        block = cast("Any", self)
        y = block.bn2(block.conv2(block.act(block.bn1(block.conv1(x)))))
        shortcut = x if block.downsample is None else block.downsample(x)
        return block.act(block.drop_path(y) + shortcut)


class _Bottleneck(nn.Module):
    """MONAI's three convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        block = cast("Any", self)
        y = block.act(block.bn2(block.conv2(block.act(block.bn1(block.conv1(x))))))
        y = block.bn3(block.conv3(y))
        shortcut = x if block.downsample is None else block.downsample(x)
        return block.act(block.drop_path(y) + shortcut)
