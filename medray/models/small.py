"""Convolutional classifiers of our own, 2-D and 3-D: one for tiny images, one with spatial attention.

Shape legend: x is (B, C, *spatial).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.models.layers import BATCH_NORM, CONV, MAX_POOL, DropPath
from medray.models.spec import ModelSpec, Request


class _Conv(nn.Sequential):
    """3x3[x3] convolution, batch norm, SiLU."""

    def __init__(self, ndim: int, inputs: int, outputs: int) -> None:
        super().__init__(
            CONV[ndim](inputs, outputs, 3, padding=1, bias=False), BATCH_NORM[ndim](outputs), nn.SiLU(inplace=True)
        )


class _Residual(nn.Module):
    def __init__(self, ndim: int, channels: int, drop_path: float) -> None:
        super().__init__()
        self.body = nn.Sequential(_Conv(ndim, channels, channels), _Conv(ndim, channels, channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.body(x))


class PooledHead(nn.Module):
    """Mean and maximum over space, dropout, one linear layer: the maximum keeps a lesion of few pixels visible."""

    def __init__(self, channels: int, num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * channels, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return self.linear(self.dropout(torch.cat([flat.mean(-1), flat.amax(-1)], dim=1)))


class SmallCNN(nn.Module):
    """A ResNet-9 for tiny images: the first level keeps every pixel, each further halves the resolution.

    After Page's DAWNBench entry (https://myrtle.ai/how-to-train-your-resnet), generalised to any depth, to 3-D, and to
    mean and maximum pooling.
    """

    def __init__(
        self, ndim: int, inputs: int, num_outputs: int, *, width: int, depth: int, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Conv(ndim, inputs, width)]
        for level in range(1, depth):
            channels = width * 2 ** min(level, 3)
            layers += [_Conv(ndim, width * 2 ** min(level - 1, 3), channels), MAX_POOL[ndim](2)]
            if level % 2 or level == depth - 1:
                layers.append(_Residual(ndim, channels, drop_path * level / (depth - 1)))
        self.features = nn.Sequential(*layers)
        self.head = PooledHead(width * 2 ** min(depth - 1, 3), num_outputs, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class SpatialAttention(nn.Module):
    """Weigh places by a convolution over the channels' mean and maximum (CBAM: Woo et al. 2018, arXiv:1807.06521)."""

    def __init__(self, ndim: int, kernel: int = 7) -> None:
        super().__init__()
        self.score = CONV[ndim](2, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.score(pooled))


class AttentionCNN(nn.Module):
    """Convolutional levels, each closed by :class:`SpatialAttention`."""

    def __init__(self, ndim: int, inputs: int, num_outputs: int, *, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level in range(depth):
            outputs = width * 2 ** min(level, 3)
            self.levels.append(
                nn.Sequential(
                    _Conv(ndim, inputs, outputs),
                    _Conv(ndim, outputs, outputs),
                    SpatialAttention(ndim, kernel=7 if ndim == 2 else 5),
                )
            )
            inputs = outputs
        self.pool = F.max_pool2d if ndim == 2 else F.max_pool3d
        self.head = PooledHead(inputs, num_outputs, dropout)

    def forward(self, x: Tensor) -> Tensor:
        for index, level in enumerate(self.levels):
            x = level(x if index == 0 else self.pool(x, 2))
        return self.head(x)


def build_small_cnn(request: Request) -> nn.Module:
    return SmallCNN(
        request.ndim,
        request.in_channels,
        request.num_outputs,
        width=request.feature_size,
        depth=request.depth,
        dropout=request.config.dropout,
        drop_path=request.config.drop_path,
    )


def build_attention_cnn(request: Request) -> nn.Module:
    return AttentionCNN(
        request.ndim,
        request.in_channels,
        request.num_outputs,
        width=request.feature_size,
        depth=request.depth,
        dropout=request.config.dropout,
    )


SPECS = (
    ModelSpec(
        name="small_cnn",
        dense=False,
        ndims=(2, 3),
        tier="lightweight",
        family="CNN",
        description="ResNet-9 for images of 16-64 pixels (Page 2018)",
        build=build_small_cnn,
        options=frozenset({"feature_size", "depth", "dropout", "drop_path", "pretrained"}),
        feature_size=32,
        depth={2: 4, 3: 4},
        stride=lambda _depth: 1,
        cells=16,
    ),
    ModelSpec(
        name="attention_cnn",
        dense=False,
        ndims=(2, 3),
        tier="lightweight",
        family="CNN",
        description="CNN with spatial attention at every level (CBAM, Woo et al. 2018)",
        build=build_attention_cnn,
        options=frozenset({"feature_size", "depth", "dropout", "pretrained"}),
        feature_size=16,
        depth={2: 4, 3: 4},
        cells=16,
    ),
)
