"""Building blocks that several families share.

Shape legend: x is (B, C, *spatial) with two or three spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
BATCH_NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL: dict[int, type[nn.AvgPool2d] | type[nn.AvgPool3d]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
DROPOUT: dict[int, type[nn.Dropout2d] | type[nn.Dropout3d]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
LINEAR_MODE = {2: "bilinear", 3: "trilinear"}
SLOPE = 0.01
"""Negative slope of the leaky ReLU, as in nnU-Net."""


class InstanceNorm(nn.Module):
    """Instance normalisation with a learnt scale and shift, by the fastest kernel for where the tensor lies.

    All ways compute the same. On a CPU ``nn.InstanceNorm`` leaves the channels-last layout (a copy each way), and
    ``group_norm``'s backward is some 25 times slower in it than in the contiguous one; batch normalisation sample by
    sample has a channels-last bf16 kernel. (2 x 32 x 40 x 56 x 40, bf16, one Zen 4 core, forward and backward:
    instance_norm 33 ms, group_norm 171 ms, this 10 ms; contiguous: 7, 6 and 12 ms.) Exported graphs get ONNX's own
    InstanceNormalization.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return F.instance_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if x.requires_grad and not x.is_contiguous():
            parts = [
                F.batch_norm(sample, None, None, self.weight, self.bias, True, 0.0, self.eps) for sample in x.split(1)
            ]
            return torch.cat(parts)
        return F.group_norm(x, x.shape[1], self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class DropPath(nn.Module):
    """Stochastic depth: leave a residual branch out for whole samples (Huang et al. 2016, arXiv:1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = 1.0 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ConvBlock(nn.Sequential):
    """3x3[x3] convolution, instance norm, leaky ReLU; channel dropout before the norm where asked."""

    def __init__(self, ndim: int, inputs: int, outputs: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        layers: list[nn.Module] = [CONV[ndim](inputs, outputs, 3, stride, 1, bias=False)]
        if dropout:
            layers.append(DROPOUT[ndim](dropout))
        layers += [InstanceNorm(outputs), nn.LeakyReLU(SLOPE, inplace=True)]
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """Two 3x3[x3] convolutions around an identity (He et al. 2016), instance norm, leaky ReLU.

    The shortcut pools and projects as in ResNet-D (arXiv:1812.01187), which is also nnU-Net's residual encoder.
    """

    def __init__(
        self,
        ndim: int,
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = ConvBlock(ndim, inputs, outputs, stride=stride, dropout=dropout)
        self.second = nn.Sequential(CONV[ndim](outputs, outputs, 3, 1, 1, bias=False), InstanceNorm(outputs))
        shortcut: list[nn.Module] = [AVG_POOL[ndim](stride)] if stride > 1 else []
        if inputs != outputs:
            shortcut += [CONV[ndim](inputs, outputs, 1, bias=False), InstanceNorm(outputs)]
        self.shortcut = nn.Sequential(*shortcut)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.shortcut(x) + self.drop_path(self.second(self.first(x))), SLOPE)


class MergeUp(nn.Module):
    """Double the resolution of x, and convolve it together with the skip, in one go.

    The textbook decoder upsamples by a transposed convolution of kernel 2, concatenates the skip and convolves by a
    3x3[x3] kernel. Without anything non-linear between them, the two on x's side are one transposed convolution of
    kernel 4, stride 2, and a convolution over a concatenation is the sum of two: the same functions (and more) with
    about 45 % fewer multiplications at that place and no concatenated copy. Kernel 4 at stride 2 also overlaps evenly,
    so that no checkerboard appears (Odena et al. 2016, doi:10.23915/distill.00003).
    """

    def __init__(self, ndim: int, deep: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = CONV_TRANSPOSE[ndim](deep, outputs, 4, 2, 1, bias=False)
        self.skip = CONV[ndim](skip, outputs, 3, 1, 1, bias=False)
        self.norm = InstanceNorm(outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.up(x) + self.skip(skip)), SLOPE, inplace=True)


def widths(feature_size: int, depth: int, ndim: int) -> list[int]:
    """Channels per level: doubled, capped at nnU-Net's 512 in 2-D and 320 in 3-D (but never below the first)."""
    cap = max({2: 512, 3: 320}[ndim], feature_size)
    return [min(feature_size * 2**level, cap) for level in range(depth)]


def initialise(module: nn.Module) -> None:
    """He-initialise convolutions for leaky ReLU, linear layers as in ViT (truncated normal, .02)."""
    gain = math.sqrt(2.0 / (1.0 + SLOPE**2))
    for part in module.modules():
        if isinstance(part, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
            # Each output sees kernel / stride taps per axis of each input channel, which PyTorch's fan-in doesn't say.
            taps = math.prod(k / s for k, s in zip(part.kernel_size, part.stride, strict=True))
            nn.init.normal_(part.weight, std=gain / math.sqrt(part.in_channels * taps))
        elif isinstance(part, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(part.weight, a=SLOPE)
        elif isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation to ``size``."""
    mode = LINEAR_MODE[x.dim() - 2]
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=False)


def replace_instance_norms(module: nn.Module) -> nn.Module:
    """Put :class:`InstanceNorm` where a vendor's network has ``nn.InstanceNorm`` with scale and shift (same names)."""
    for name, child in module.named_children():
        if isinstance(child, (nn.InstanceNorm2d, nn.InstanceNorm3d)) and child.affine and not child.track_running_stats:
            setattr(module, name, InstanceNorm(child.num_features, child.eps))
        else:
            replace_instance_norms(child)
    return module
