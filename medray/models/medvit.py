"""MedViT: convolution and attention side by side, for medical images. 2-D.

After Manzari et al. 2023, "MedViT: A robust vision transformer for generalized medical image classification"
(Computers in Biology and Medicine 157:106791, arXiv:2302.09462), which builds on Next-ViT (Li et al. 2022,
arXiv:2207.05501): stages of efficient convolution blocks (multi-head convolutional attention), each closed by local
transformer blocks (efficient self-attention beside convolutional attention), all with locally enhanced feed-forward
layers.

Shape legend: x is (B, C, H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.models.layers import DropPath
from medray.models.spec import ModelSpec, Request
from medray.models.timm_nets import stem_reductions

_HEAD = 32
"""Channels of a head, in both kinds of attention."""
_SHARE = 0.75
"""Of a transformer block's channels: attention; the rest is convolutional."""
_STAGES: tuple[tuple[tuple[int, bool], ...], ...] = (
    ((96, False),) * 3,
    ((192, False),) * 3 + ((256, True),),
    (((384, False),) * 4 + ((512, True),)) * 2,
    ((768, False),) * 2 + ((1024, True),),
)
"""(channels, transformer?) of each block: MedViT-Tiny."""
_POOLING = (8, 4, 2, 1)
"""By how much a stage's attention pools its keys and values per axis."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class PatchEmbed(nn.Module):
    """Fit resolution (average pooling) and channels (1x1 convolution) to the next block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)] if stride == 2 else []
        if stride == 2 or inputs != outputs:
            parts += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ConvAttention(nn.Module):
    """Multi-head convolutional attention: a grouped 3x3 convolution, each group a head, and a mixing 1x1 one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = _conv(channels, channels, 3, groups=channels // _HEAD)
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.heads(x))


class LocalFeedForward(nn.Module):
    """Expand, look at the neighbours, weigh the channels, project (LocalViT: Li et al. 2021, arXiv:2104.05707)."""

    def __init__(self, channels: int, ratio: int, dropout: float) -> None:
        super().__init__()
        hidden = channels * ratio
        self.expand = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(inplace=True)
        )
        self.local = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(inplace=True),
        )
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, max(channels // 4, 8), 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(max(channels // 4, 8), hidden, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(self.expand(x))
        return self.dropout(self.project(x * self.weigh(x)))


class PooledAttention(nn.Module):
    """Self-attention whose keys and values are pooled ``pool`` times per axis (E-MHSA of Next-ViT)."""

    def __init__(self, channels: int, pool: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = channels // _HEAD, dropout
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)
        self.pool: nn.Module = nn.Identity()
        if pool > 1:
            self.pool = nn.Sequential(
                nn.AvgPool2d(pool, ceil_mode=True, count_include_pad=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        pooled = self.pool(x).flatten(2).transpose(1, 2)
        query = self.query(tokens).unflatten(2, (self.heads, _HEAD)).transpose(1, 2)
        key, value = self.key_value(pooled).unflatten(2, (2, self.heads, _HEAD)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


class ConvolutionBlock(nn.Module):
    """Efficient convolution block (ECB)."""

    def __init__(self, inputs: int, channels: int, stride: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.embed = PatchEmbed(inputs, channels, stride)
        self.attention = ConvAttention(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.mlp = LocalFeedForward(channels, 3, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.drop_path(self.attention(x))
        return x + self.drop_path(self.mlp(self.norm(x)))


class TransformerBlock(nn.Module):
    """Local transformer block (LTB): global attention on most channels, convolutional attention on the rest."""

    def __init__(self, inputs: int, channels: int, stride: int, pool: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        wide = int(channels * _SHARE) // _HEAD * _HEAD
        self.embed = PatchEmbed(inputs, wide, stride)
        self.norm1 = nn.BatchNorm2d(wide)
        self.attention = PooledAttention(wide, pool, dropout)
        self.narrow = PatchEmbed(wide, channels - wide, 1)
        self.local = ConvAttention(channels - wide)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = LocalFeedForward(channels, 2, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        detail = self.narrow(x)
        x = torch.cat([x, detail + self.drop_path(self.local(detail))], dim=1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MedViT(nn.Module):
    """The network. ``reductions`` of the stem's two halvings are left out for small images."""

    def __init__(self, inputs: int, num_outputs: int, *, reductions: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        first, second = (2 if reductions < 2 else 1), (2 if reductions < 1 else 1)
        self.stem = nn.Sequential(
            _conv(inputs, 64, 3, first), _conv(64, 32, 3), _conv(32, 64, 3), _conv(64, 64, 3, second)
        )
        rates = iter(torch.linspace(0, drop_path, sum(map(len, _STAGES)), device="cpu").tolist())
        blocks: list[nn.Module] = []
        channels = 64
        for level, (stage, pool) in enumerate(zip(_STAGES, _POOLING, strict=True)):
            for index, (outputs, attends) in enumerate(stage):
                stride = 2 if level and index == 0 else 1
                rate = next(rates)
                if attends:
                    blocks.append(TransformerBlock(channels, outputs, stride, pool, dropout, rate))
                else:
                    blocks.append(ConvolutionBlock(channels, outputs, stride, dropout, rate))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, num_outputs)
        )
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))


def build_medvit(request: Request) -> nn.Module:
    return MedViT(
        request.in_channels,
        request.num_outputs,
        reductions=stem_reductions(request.patch_size),
        dropout=request.config.dropout,
        drop_path=request.config.drop_path,
    )


SPECS = (
    ModelSpec(
        name="medvit",
        dense=False,
        ndims=(2,),
        tier="balanced",
        family="ViT",
        description="MedViT-T: convolutional and pooled self-attention (Manzari et al. 2023)",
        build=build_medvit,
        options=frozenset({"dropout", "drop_path", "pretrained"}),
        cells=16,
    ),
)
