"""U-Net++: nested, dense skips (Zhou et al. 2018, arXiv:1807.10165). 2-D and 3-D.

Shape legend: x is (B, C, *spatial). Node (i, j) lies at level i and has j predecessors there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medray.models.layers import CONV, ConvBlock, MergeUp, initialise, widths
from medray.models.spec import ModelSpec, Request
from medray.models.unet import Encoder, halvings


class _Node(nn.Module):
    """Merge the coarser neighbour with all predecessors of the level, and refine."""

    def __init__(self, ndim: int, deep: int, width: int, predecessors: int, dropout: float) -> None:
        super().__init__()
        self.merge = MergeUp(ndim, deep, width * predecessors, width)
        self.refine = ConvBlock(ndim, width, width, dropout=dropout)

    def forward(self, coarser: Tensor, predecessors: Sequence[Tensor]) -> Tensor:
        skip = predecessors[0] if len(predecessors) == 1 else torch.cat(list(predecessors), dim=1)
        return self.refine(self.merge(coarser, skip))


class UNetPlusPlus(nn.Module):
    """With deep supervision every node of level 0 has a head; all give full resolution, the deepest comes first."""

    def __init__(
        self,
        ndim: int,
        inputs: int,
        channels: Sequence[int],
        num_outputs: int,
        *,
        dropout: float,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.encoder = Encoder(ndim, inputs, channels, dropout)
        last = len(channels) - 1
        self.nodes = nn.ModuleDict(
            {
                f"{i}-{j}": _Node(ndim, channels[i + 1], channels[i], j, dropout)
                for j in range(1, last + 1)
                for i in range(last - j + 1)
            }
        )
        self.heads = nn.ModuleList(
            CONV[ndim](channels[0], num_outputs, 1) for _ in range(last if deep_supervision else 1)
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        levels = [[feature] for feature in self.encoder(x)]
        for j in range(1, len(levels)):
            for i in range(len(levels) - j):
                levels[i].append(self.nodes[f"{i}-{j}"](levels[i + 1][j - 1], levels[i]))
        if self.deep_supervision and self.training:
            return [head(node) for head, node in zip(self.heads, levels[0][:0:-1], strict=True)]
        return self.heads[0](levels[0][-1])


def build_unetpp(request: Request) -> nn.Module:
    return UNetPlusPlus(
        request.ndim,
        request.in_channels,
        widths(request.feature_size, request.depth, request.ndim),
        request.num_outputs,
        dropout=request.config.dropout,
        deep_supervision=request.config.deep_supervision,
    )


SPECS = (
    ModelSpec(
        name="unetpp",
        dense=True,
        ndims=(2, 3),
        tier="high-accuracy",
        family="U-Net",
        description="U-Net++ with nested skips (Zhou et al. 2018)",
        build=build_unetpp,
        options=frozenset({"feature_size", "depth", "dropout", "dropout_kind", "deep_supervision", "pretrained"}),
        feature_size=32,
        depth={2: 5, 3: 4},
        stride=halvings,
        cells=2,
    ),
)
