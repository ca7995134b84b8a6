"""Global attention for segmentation: UNETR and TransUNet. 2-D and 3-D.

Shape legend: x is (B, C, *spatial); tokens are (B, N, D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medray.models.layers import CONV, CONV_TRANSPOSE, ConvBlock, ResidualBlock, widths
from medray.models.spec import ModelSpec, Request
from medray.models.transformer import Block, PositionEmbedding
from medray.models.unet import ResidualEncoder, halvings, with_decoder

_HEAD = 64
"""Channels of an attention head."""
_PATCH = 16
_LAYERS = 12


def _grid(request: Request, stride: int) -> tuple[int, ...]:
    """Tokens per axis that positions are learnt for; others are interpolated."""
    if request.patch_size is None:
        return {2: (14, 14), 3: (6, 6, 6)}[request.ndim]
    return tuple(n // stride for n in request.patch_size)


def _blocks(dim: int, layers: int, dropout: float, drop_path: float) -> nn.ModuleList:
    rates = torch.linspace(0, drop_path, layers, device="cpu").tolist()
    return nn.ModuleList(Block(dim, max(dim // _HEAD, 1), dropout, rate) for rate in rates)


class UNETREncoder(nn.Module):
    """A ViT over 16-pixel patches; its layers 3, 6 and 9 are brought up to an eighth ... half of the resolution."""

    def __init__(self, request: Request, channels: Sequence[int]) -> None:
        super().__init__()
        ndim, dim = request.ndim, channels[-1]
        self.embed = CONV[ndim](request.in_channels, dim, _PATCH, _PATCH)
        self.position = PositionEmbedding(dim, _grid(request, _PATCH))
        self.blocks = _blocks(dim, _LAYERS, request.config.dropout, request.config.drop_path)
        self.norm = nn.LayerNorm(dim)
        self.stem = ResidualBlock(ndim, request.in_channels, channels[0])
        self.bridges = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Sequential(
                        CONV_TRANSPOSE[ndim](dim if step == 0 else width, width, 2, 2, bias=False),
                        ConvBlock(ndim, width, width),
                    )
                    for step in range(len(channels) - 1 - level)
                )
            )
            for level, width in enumerate(channels[1:-1], start=1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all levels, full resolution first."""
        grid = self.position(self.embed(x))
        shape = grid.shape[2:]
        tokens = grid.flatten(2).transpose(1, 2)
        taps = []
        for index, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if index % 3 == 0:
                normed = self.norm(tokens) if index == _LAYERS else tokens
                taps.append(normed.transpose(1, 2).unflatten(2, shape))
        skips = [bridge(tap) for bridge, tap in zip(self.bridges, taps[:-1], strict=True)]
        return [self.stem(x), *skips, taps[-1]]


class TransUNetEncoder(nn.Module):
    """Residual convolutions, and a transformer over the grid of the coarsest level."""

    def __init__(self, request: Request, channels: Sequence[int], layers: int) -> None:
        super().__init__()
        config, ndim, dim = request.config, request.ndim, channels[-1]
        self.cnn = ResidualEncoder(ndim, request.in_channels, channels[:-1], config.dropout, config.drop_path)
        self.embed = CONV[ndim](channels[-2], dim, 2, 2)
        self.position = PositionEmbedding(dim, _grid(request, halvings(len(channels))))
        self.blocks = _blocks(dim, layers, config.dropout, config.drop_path)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all levels, full resolution first."""
        features = self.cnn(x)
        grid = self.position(self.embed(features[-1]))
        tokens = grid.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return [*features, self.norm(tokens).transpose(1, 2).unflatten(2, grid.shape[2:])]


def build_unetr(request: Request) -> nn.Module:
    """UNETR; the transformer is 48 times ``feature_size`` wide (768 for the paper's 16)."""
    width = request.feature_size
    channels = [width, 2 * width, 4 * width, 8 * width, 48 * width]
    return with_decoder(request, UNETREncoder(request, channels), channels)


def build_transunet(request: Request) -> nn.Module:
    """TransUNet, compact: half of the paper's twelve layers, 16 times ``feature_size`` wide."""
    channels = [
        *widths(request.feature_size, request.depth - 1, request.ndim),
        16 * request.feature_size,
    ]
    return with_decoder(request, TransUNetEncoder(request, channels, _LAYERS // 2), channels)


_OPTIONS = frozenset({"feature_size", "dropout", "dropout_kind", "drop_path", "deep_supervision", "pretrained"})

SPECS = (
    ModelSpec(
        name="unetr",
        dense=True,
        ndims=(2, 3),
        tier="high-accuracy",
        family="ViT",
        description="ViT encoder under a convolutional decoder (Hatamizadeh et al. 2022, arXiv:2103.10504)",
        build=build_unetr,
        options=_OPTIONS,
        feature_size=16,
        feature_multiple=4,
        stride=lambda _depth: _PATCH,
    ),
    ModelSpec(
        name="transunet",
        dense=True,
        ndims=(2, 3),
        tier="high-accuracy",
        family="ViT",
        description="CNN, then a transformer at its coarsest level (Chen et al. 2021, arXiv:2102.04306)",
        build=build_transunet,
        options=_OPTIONS | {"depth"},
        feature_size=32,
        feature_multiple=4,
        depth={2: 5, 3: 5},
        shallowest=3,
        stride=halvings,
    ),
)
