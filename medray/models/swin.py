"""Segmentation by shifted windows: Swin-UNETR (convolutional decoder) and Swin-UNet (transformers throughout). 2-D and
3-D.

Shape legend: x is (B, C, *spatial); a grid of tokens is (B, *grid, D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from medray.models.layers import CONV, ResidualBlock
from medray.models.spec import ModelSpec, Request
from medray.models.transformer import PatchExpanding, PatchMerging, WindowBlock
from medray.models.unet import Decoder, UNet, halvings

_WINDOW = 7
_BLOCKS = 2
_HEADS = 3
"""At the first level; doubled with the width, so that a head keeps a third of ``feature_size``."""


def _stage(ndim: int, dim: int, level: int, dropout: float, rates: Iterator[float]) -> nn.Sequential:
    """Two blocks, the second one shifted."""
    return nn.Sequential(
        *(
            WindowBlock(
                ndim,
                dim,
                _HEADS * 2**level,
                window=_WINDOW,
                shifted=bool(block % 2),
                dropout=dropout,
                drop_path=next(rates),
            )
            for block in range(_BLOCKS)
        )
    )


def _rates(highest: float, blocks: int) -> Iterator[float]:
    return iter(torch.linspace(0, highest, blocks, device="cpu").tolist())


class SwinEncoder(nn.Module):
    """Swin transformer levels from half the resolution on, each handed to the decoder through a residual block."""

    def __init__(self, ndim: int, inputs: int, width: int, depth: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        stages = depth - 2
        rates = _rates(drop_path, _BLOCKS * stages)
        self.embed = CONV[ndim](inputs, width, 2, 2)
        self.stages = nn.ModuleList(_stage(ndim, width * 2**i, i, dropout, rates) for i in range(stages))
        self.merges = nn.ModuleList(PatchMerging(ndim, width * 2**i) for i in range(stages))
        self.norms = nn.ModuleList(nn.LayerNorm(width * 2**i) for i in range(stages + 1))
        self.channels = [width, *(width * 2**i for i in range(stages + 1))]
        self.bridges = nn.ModuleList(
            ResidualBlock(ndim, inputs if level == 0 else channels, channels)
            for level, channels in enumerate(self.channels)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all levels, full resolution first."""
        levels = [x]
        grid = self.embed(x).movedim(1, -1)
        for index, norm in enumerate(self.norms):
            if index:
                grid = self.merges[index - 1](self.stages[index - 1](grid))
            levels.append(norm(grid).movedim(-1, 1))
        return [bridge(level) for bridge, level in zip(self.bridges, levels, strict=True)]


class SwinUNet(nn.Module):
    """Swin transformers down and up, with skips.

    The last expansion, by four, keeps a quarter of the width (the original keeps all of it): in 3-D the full width
    would be the largest tensor of the network by far.
    """

    def __init__(
        self, ndim: int, inputs: int, num_outputs: int, *, width: int, depth: int, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        rates = list(_rates(drop_path, _BLOCKS * depth))
        dims = [width * 2**i for i in range(depth)]
        down = iter(rates)
        self.embed = CONV[ndim](inputs, width, 4, 4)
        self.embed_norm = nn.LayerNorm(width)
        self.down = nn.ModuleList(_stage(ndim, dims[i], i, dropout, down) for i in range(depth))
        self.merges = nn.ModuleList(PatchMerging(ndim, dims[i]) for i in range(depth - 1))
        self.expands = nn.ModuleList(PatchExpanding(ndim, dims[i + 1], dims[i], 2) for i in range(depth - 1))
        self.joins = nn.ModuleList(nn.Linear(2 * dims[i], dims[i]) for i in range(depth - 1))
        self.up = nn.ModuleList(
            _stage(ndim, dims[i], i, dropout, iter(rates[_BLOCKS * i : _BLOCKS * (i + 1)])) for i in range(depth - 1)
        )
        self.last = PatchExpanding(ndim, width, max(width // 4, 4), 4)
        self.head = CONV[ndim](max(width // 4, 4), num_outputs, 1)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed_norm(self.embed(x).movedim(1, -1))
        skips = []
        for level, stage in enumerate(self.down):
            grid = stage(grid)
            if level < len(self.merges):
                skips.append(grid)
                grid = self.merges[level](grid)
        for level in reversed(range(len(skips))):
            grid = self.joins[level](torch.cat([self.expands[level](grid), skips[level]], dim=-1))
            grid = self.up[level](grid)
        return self.head(self.last(grid).movedim(-1, 1))


def build_swin_unetr(request: Request) -> nn.Module:
    """Swin-UNETR; ``depth`` counts resolution levels, the full one included."""
    config = request.config
    encoder = SwinEncoder(
        request.ndim, request.in_channels, request.feature_size, request.depth, config.dropout, config.drop_path
    )
    decoder = Decoder(request.ndim, encoder.channels, request.num_outputs, deep_supervision=config.deep_supervision)
    return UNet(encoder, decoder)


def build_swin_unet(request: Request) -> nn.Module:
    """Swin-UNet; ``depth`` counts levels of tokens, the first one of 4 pixels a side."""
    return SwinUNet(
        request.ndim,
        request.in_channels,
        request.num_outputs,
        width=request.feature_size,
        depth=request.depth,
        dropout=request.config.dropout,
        drop_path=request.config.drop_path,
    )


SPECS = (
    ModelSpec(
        name="swin_unetr",
        dense=True,
        ndims=(2, 3),
        tier="high-accuracy",
        family="Swin",
        description="Swin encoder under a convolutional decoder (Hatamizadeh et al. 2022, arXiv:2201.01266)",
        build=build_swin_unetr,
        options=frozenset({"feature_size", "depth", "dropout", "drop_path", "deep_supervision", "pretrained"}),
        feature_size=24,
        feature_multiple=12,
        depth={2: 5, 3: 5},
        shallowest=3,
        stride=halvings,
        cells=2,
    ),
    ModelSpec(
        name="swin_unet",
        dense=True,
        ndims=(2, 3),
        tier="balanced",
        family="Swin",
        description="U-shaped Swin transformer without convolutions (Cao et al. 2021, arXiv:2105.05537)",
        build=build_swin_unet,
        options=frozenset({"feature_size", "depth", "dropout", "drop_path", "pretrained"}),
        feature_size=48,
        feature_multiple=12,
        depth={2: 4, 3: 3},
        stride=lambda depth: 4 * halvings(depth),
    ),
)
