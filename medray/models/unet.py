"""U-Nets of our own: plain, residual-encoder, attention-gated. 2-D and 3-D.

Shape legend: x is (B, C, *spatial); level 0 is the full resolution, each further one half of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.models.layers import (
    CONV,
    SLOPE,
    ConvBlock,
    InstanceNorm,
    MergeUp,
    ResidualBlock,
    initialise,
    resize,
    widths,
)
from medray.models.spec import ModelSpec, Request

RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6)
"""Residual blocks per level, as in nnU-Net's ResEnc presets."""


class Encoder(nn.Module):
    """Two convolutions a level, the first strided (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z)."""

    def __init__(self, ndim: int, inputs: int, channels: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level, outputs in enumerate(channels):
            self.levels.append(
                nn.Sequential(
                    ConvBlock(ndim, inputs, outputs, stride=1 if level == 0 else 2, dropout=dropout),
                    ConvBlock(ndim, outputs, outputs, dropout=dropout),
                )
            )
            inputs = outputs

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all levels, full resolution first."""
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return features


class ResidualEncoder(Encoder):
    """Residual blocks instead (nnU-Net Revisited, Isensee et al. 2024, arXiv:2404.09556)."""

    def __init__(self, ndim: int, inputs: int, channels: Sequence[int], dropout: float, drop_path: float) -> None:
        nn.Module.__init__(self)
        blocks = RESIDUAL_BLOCKS[: len(channels)]
        rates = iter(torch.linspace(0, drop_path, sum(blocks), device="cpu").tolist())
        self.levels = nn.ModuleList()
        for level, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
            parts: list[nn.Module] = []
            if level == 0:
                parts.append(ConvBlock(ndim, inputs, outputs, dropout=dropout))
                inputs = outputs
            for block in range(count):
                parts.append(
                    ResidualBlock(
                        ndim,
                        inputs,
                        outputs,
                        stride=2 if level and block == 0 else 1,
                        dropout=dropout,
                        drop_path=next(rates),
                    )
                )
                inputs = outputs
            self.levels.append(nn.Sequential(*parts))


class AttentionGate(nn.Module):
    """Weigh the skip by what the coarser level attends to (Oktay et al. 2018, arXiv:1804.03999)."""

    def __init__(self, ndim: int, deep: int, skip: int) -> None:
        super().__init__()
        inner = max(skip // 2, 1)
        self.query = CONV[ndim](deep, inner, 1)
        self.key = CONV[ndim](skip, inner, 2, 2, bias=False)
        self.score = CONV[ndim](inner, 1, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        score = self.score(F.leaky_relu(self.query(x) + self.key(skip), SLOPE))
        return skip * torch.sigmoid(resize(score, skip.shape[2:]))


class Decoder(nn.Module):
    """From features of all levels to logits.

    Args:
        channels: of the features, full resolution first.
        num_outputs: K.
        refine: convolutions after the one that merges the skip.
        gated: attention gates on the skips.
        deep_supervision: heads on all but the coarsest decoded level; used in training mode only.
    """

    def __init__(
        self,
        ndim: int,
        channels: Sequence[int],
        num_outputs: int,
        *,
        refine: int = 1,
        gated: bool = False,
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        decoded = len(channels) - 1
        self.deep_supervision = deep_supervision
        self.gates = nn.ModuleList(
            AttentionGate(ndim, channels[i + 1], channels[i]) if gated else _First() for i in range(decoded)
        )
        self.merges = nn.ModuleList(MergeUp(ndim, channels[i + 1], channels[i], channels[i]) for i in range(decoded))
        self.refines = nn.ModuleList(
            nn.Sequential(*(ConvBlock(ndim, channels[i], channels[i], dropout=dropout) for _ in range(refine)))
            for i in range(decoded)
        )
        heads = max(1, decoded - 1) if deep_supervision else 1
        self.heads = nn.ModuleList(CONV[ndim](channels[i], num_outputs, 1) for i in range(heads))

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits (B, K, *spatial); with deep supervision in training, of several levels, full resolution first."""
        *skips, x = features
        every = self.deep_supervision and self.training
        outputs: list[Tensor] = []
        for level in reversed(range(len(skips))):
            x = self.merges[level](x, self.gates[level](x, skips[level]))
            x = self.refines[level](x)
            if level == 0 or (every and level < len(self.heads)):
                outputs.append(self.heads[level](x))
        return outputs[::-1] if every else outputs[-1]


class _First(nn.Module):
    """No gate: the skip as it is."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # noqa: ARG002 (the signature of AttentionGate)
        return skip


class UNet(nn.Module):
    """An encoder and a :class:`Decoder`."""

    def __init__(self, encoder: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        initialise(self)
        for part in encoder.modules():
            # A residual branch starts silent, so that depth costs no stability (Goyal et al. 2017, arXiv:1706.02677).
            if isinstance(part, ResidualBlock):
                norm = part.second[-1]
                assert isinstance(norm, InstanceNorm)
                nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.decoder(self.encoder(x))


def with_decoder(
    request: Request, encoder: nn.Module, channels: Sequence[int], *, refine: int = 1, gated: bool = False
) -> UNet:
    """An encoder under the house's decoder.

    Args:
        request: of the network.
        encoder: gives features of all levels, full resolution first.
        channels: of these.
        refine, gated: of :class:`Decoder`.
    """
    decoder = Decoder(
        request.ndim,
        channels,
        request.num_outputs,
        refine=refine,
        gated=gated,
        dropout=request.config.dropout,
        deep_supervision=request.config.deep_supervision,
    )
    return UNet(encoder, decoder)


def build_unet(request: Request) -> nn.Module:
    """The plain U-Net: the default."""
    channels = widths(request.feature_size, request.depth, request.ndim)
    encoder = Encoder(request.ndim, request.in_channels, channels, request.config.dropout)
    return with_decoder(request, encoder, channels)


def build_attention_unet(request: Request) -> nn.Module:
    """The plain U-Net with gated skips."""
    channels = widths(request.feature_size, request.depth, request.ndim)
    encoder = Encoder(request.ndim, request.in_channels, channels, request.config.dropout)
    return with_decoder(request, encoder, channels, gated=True)


def build_resenc_unet(request: Request) -> nn.Module:
    """Residual encoder, one convolution a level in the decoder."""
    channels = widths(request.feature_size, request.depth, request.ndim)
    encoder = ResidualEncoder(
        request.ndim, request.in_channels, channels, request.config.dropout, request.config.drop_path
    )
    return with_decoder(request, encoder, channels, refine=0)


def halvings(depth: int) -> int:
    """Total stride of a network that halves the resolution between its levels."""
    return 2 ** (depth - 1)


_PLAIN = frozenset({"feature_size", "depth", "dropout", "dropout_kind", "deep_supervision", "pretrained"})
DEPTH = {2: 5, 3: 4}

SPECS = (
    ModelSpec(
        name="unet",
        dense=True,
        ndims=(2, 3),
        tier="balanced",
        family="U-Net",
        description="plain convolutional U-Net of nnU-Net's kind, the default (Isensee et al. 2021)",
        build=build_unet,
        options=_PLAIN,
        feature_size=32,
        depth=DEPTH,
        stride=halvings,
        cells=2,
    ),
    ModelSpec(
        name="attention_unet",
        dense=True,
        ndims=(2, 3),
        tier="balanced",
        family="U-Net",
        description="U-Net with attention gates on its skips (Oktay et al. 2018)",
        build=build_attention_unet,
        options=_PLAIN,
        feature_size=32,
        depth=DEPTH,
        stride=halvings,
        cells=2,
    ),
    ModelSpec(
        name="resenc_unet",
        dense=True,
        ndims=(2, 3),
        tier="high-accuracy",
        family="U-Net",
        description="residual-encoder U-Net as in nnU-Net's ResEnc presets (Isensee et al. 2024)",
        build=build_resenc_unet,
        options=_PLAIN | {"drop_path"},
        feature_size=32,
        depth={2: 6, 3: 5},
        stride=halvings,
        cells=2,
    ),
)
