"""Elastic networks: width, number of blocks, kernel and expansion are fields of each level, for a search to set.

The space is that of once-for-all networks (Cai et al. 2020, arXiv:1908.09791), of inverted residuals (MBConv: Sandler
et al. 2018, arXiv:1801.04381), with their latency measured rather than looked up. Every choice trains its own weights.

Shape legend: x is (B, C, *spatial); level 0 is the full resolution, each further one half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medray.config.schema import ModelConfig
from medray.models.layers import CONV, SLOPE, ConvBlock, DropPath, InstanceNorm, widths
from medray.models.operations import Norm, norm_of
from medray.models.small import PooledHead
from medray.models.spec import ModelSpec, Request
from medray.models.unet import DEPTH, halvings, with_decoder

MULTIPLE = 4
"""Channels are a multiple of it."""


class Level(NamedTuple):
    """What a level is where its configuration leaves it open; see :class:`~medray.config.schema.ElasticLevel`."""

    width: float = 1.0
    blocks: int = 2
    kernel: int = 3
    expansion: int = 4


def channels_of(config: ModelConfig, feature_size: int, depth: int, ndim: int) -> list[int]:
    """Channels of each level: the family's own, times the level's width."""
    levels = levels_of(config, depth)
    return [
        max(MULTIPLE, round(own * level.width / MULTIPLE) * MULTIPLE)
        for own, level in zip(widths(feature_size, depth, ndim), levels, strict=True)
    ]


def levels_of(config: ModelConfig, depth: int) -> list[Level]:
    """The settings of the levels that there are; beyond the sixth those of the sixth."""
    every = config.elastic
    asked = [every.level0, every.level1, every.level2, every.level3, every.level4, every.level5]
    own = [Level(**level.model_dump(exclude_none=True)) for level in asked]
    return own[:depth] + own[-1:] * max(0, depth - len(own))


class MBConv(nn.Module):
    """Widen, a depth-wise convolution, narrow again; around an identity where the shape stays."""

    def __init__(
        self, ndim: int, inputs: int, outputs: int, level: Level, *, stride: int, norm: Norm, drop_path: float
    ) -> None:
        super().__init__()
        inner = inputs * level.expansion
        conv, kernel = CONV[ndim], level.kernel
        self.body = nn.Sequential(
            conv(inputs, inner, 1, bias=False),
            norm(inner),
            nn.LeakyReLU(SLOPE, inplace=True),
            conv(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            norm(inner),
            nn.LeakyReLU(SLOPE, inplace=True),
            conv(inner, outputs, 1, bias=False),
            norm(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.body(x)) if self.is_residual else self.body(x)


def _blocks(request: Request, channels: Sequence[int], inputs: int, first: int, norm: Norm) -> list[nn.Sequential]:
    """Levels ``first`` and on, each but level 0 beginning with half the resolution."""
    levels = levels_of(request.config, request.depth)[first:]
    count = sum(level.blocks for level in levels)
    rates = iter(torch.linspace(0, request.config.drop_path, count, device="cpu").tolist())
    made = []
    for number, (level, outputs) in enumerate(zip(levels, channels[first:], strict=True), start=first):
        parts: list[nn.Module] = []
        for block in range(level.blocks):
            stride = 2 if number and block == 0 else 1
            parts.append(MBConv(request.ndim, inputs, outputs, level, stride=stride, norm=norm, drop_path=next(rates)))
            inputs = outputs
        made.append(nn.Sequential(*parts))
    return made


class ElasticEncoder(nn.Module):
    """Convolutions at full resolution (``level0.blocks`` of them), inverted residuals below."""

    def __init__(self, request: Request, channels: Sequence[int]) -> None:
        super().__init__()
        dropout, ndim = request.config.dropout, request.ndim
        inputs, convolutions = request.in_channels, []
        for _ in range(levels_of(request.config, request.depth)[0].blocks):
            convolutions.append(ConvBlock(ndim, inputs, channels[0], dropout=dropout))
            inputs = channels[0]
        lower = _blocks(request, channels, inputs, 1, InstanceNorm)
        self.levels = nn.ModuleList([nn.Sequential(*convolutions), *lower])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all levels, full resolution first."""
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class ElasticClassifier(nn.Module):
    """A convolution, levels of inverted residuals, a pooled head."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        norm = norm_of("classification", request.ndim)
        channels = channels_of(request.config, request.feature_size, request.depth, request.ndim)
        self.stem = nn.Sequential(
            CONV[request.ndim](request.in_channels, channels[0], 3, 1, 1, bias=False),
            norm(channels[0]),
            nn.LeakyReLU(SLOPE, inplace=True),
        )
        self.levels = nn.ModuleList(_blocks(request, channels, channels[0], 0, norm))
        self.head = PooledHead(channels[-1], request.num_outputs, request.config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for level in self.levels:
            x = level(x)
        return self.head(x)


def build_elastic_unet(request: Request) -> nn.Module:
    """An elastic encoder under the house's decoder."""
    channels = channels_of(request.config, request.feature_size, request.depth, request.ndim)
    return with_decoder(request, ElasticEncoder(request, channels), channels)


SPECS = (
    ModelSpec(
        name="elastic_unet",
        dense=True,
        ndims=(2, 3),
        tier="lightweight",
        family="elastic",
        description="U-Net of inverted residuals whose levels a search may shape (Cai et al. 2020)",
        build=build_elastic_unet,
        options=frozenset(
            {
                "feature_size",
                "depth",
                "dropout",
                "dropout_kind",
                "drop_path",
                "deep_supervision",
                "pretrained",
                "elastic",
            }
        ),
        feature_size=16,
        depth=DEPTH,
        stride=halvings,
        cells=2,
    ),
    ModelSpec(
        name="elastic_mbconv",
        dense=False,
        ndims=(2, 3),
        tier="lightweight",
        family="elastic",
        description="inverted residuals whose levels a search may shape (Cai et al. 2020)",
        build=ElasticClassifier,
        options=frozenset({"feature_size", "depth", "dropout", "drop_path", "pretrained", "elastic"}),
        feature_size=16,
        depth={2: 4, 3: 4},
        cells=16,
    ),
)
