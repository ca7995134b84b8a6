"""BiSeNet: a fast segmentation network of two paths (Yu et al. 2018, arXiv:1808.00897). 2-D.

Shape legend: x is (B, C, H, W); /n is a resolution n times coarser.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medray.models.dropout import drop_after
from medray.models.layers import resize
from medray.models.spec import ModelSpec, Request

_WIDTH = 128
"""Channels of the context path after its attention."""


class _Conv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class _Weigh(nn.Module):
    """Channel weights from the global mean. No norm there: one value a channel and image has no batch statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.score(x)


class BiSeNet(nn.Module):
    """A shallow spatial path at /8 beside a ResNet-18 context path to /32, fused by channel attention."""

    def __init__(self, context: nn.Module, inputs: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            _Conv(inputs, 64, 7, 2), _Conv(64, 64, 3, 2), _Conv(64, 64, 3, 2), _Conv(64, 128, 1)
        )
        self.context = context
        self.refine16 = nn.Sequential(_Conv(256, _WIDTH, 3), _Weigh(_WIDTH))
        self.refine32 = nn.Sequential(_Conv(512, _WIDTH, 3), _Weigh(_WIDTH))
        self.scene = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, _WIDTH, 1), nn.ReLU(inplace=True))
        self.up32, self.up16 = _Conv(_WIDTH, _WIDTH, 3), _Conv(_WIDTH, _WIDTH, 3)
        self.fuse = _Conv(128 + _WIDTH, 256, 1)
        self.weigh = _Weigh(256)
        last = _Conv(256, 64, 3)
        drop_after(last, 2, dropout)
        self.head = nn.Sequential(last, nn.Conv2d(64, num_outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        detail = self.spatial(x)
        at16, at32 = self.context(x)
        deep = self.refine32(at32) + self.scene(at32)
        middle = self.refine16(at16) + self.up32(resize(deep, at16.shape[2:]))
        context = self.up16(resize(middle, detail.shape[2:]))
        fused = self.fuse(torch.cat([detail, context], dim=1))
        return resize(self.head(fused + self.weigh(fused)), x.shape[2:])


def build_bisenet(request: Request) -> nn.Module:
    """BiSeNet with timm's ResNet-18 as context path."""
    import timm

    context = timm.create_model(
        "resnet18",
        pretrained=request.hub,
        in_chans=request.in_channels,
        features_only=True,
        out_indices=(3, 4),
        drop_path_rate=request.config.drop_path,
    )
    return BiSeNet(context, request.in_channels, request.num_outputs, request.config.dropout)


SPECS = (
    ModelSpec(
        name="bisenet",
        dense=True,
        ndims=(2,),
        tier="lightweight",
        family="BiSeNet",
        description="BiSeNet, a spatial and a context path for speed (Yu et al. 2018)",
        build=build_bisenet,
        options=frozenset({"dropout", "dropout_kind", "drop_path", "pretrained"}),
        stride=lambda _depth: 32,
        cells=2,
        hub=True,
    ),
)
