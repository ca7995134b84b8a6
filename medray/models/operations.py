"""The operations that an architecture search chooses from, in 2-D and 3-D.

Shape legend: x is (B, C, *spatial); stride 2 gives ceil(n / 2) of each axis. Activation, convolution, norm, in this
order and nothing in place: several operations read the same tensor (Liu et al. 2019, arXiv:1806.09055).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from medray.config.genotype import Operation
from medray.models.layers import BATCH_NORM, CONV, MAX_POOL, SLOPE, InstanceNorm

__all__ = ["AveragePool", "Norm", "norm_of", "operation", "project"]

Norm = Callable[[int], nn.Module]
"""Makes the normalisation of so many channels."""


def norm_of(kind: str, ndim: int) -> Norm:
    """Batch normalisation in classification; instance normalisation, as all of the house's U-Nets, in segmentation."""
    return InstanceNorm if kind == "segmentation" else BATCH_NORM[ndim]


class AveragePool(nn.Module):
    """Mean over that part of 3x3[x3] which lies inside of the image."""

    def __init__(self, ndim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pool = F.avg_pool2d if ndim == 2 else F.avg_pool3d

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, 3, self.stride, 1, count_include_pad=False)

    def extra_repr(self) -> str:
        return f"3, stride={self.stride}"


def project(ndim: int, inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    """Activation, 1x1[x1] convolution, norm."""
    return nn.Sequential(nn.LeakyReLU(SLOPE), CONV[ndim](inputs, outputs, 1, bias=False), norm(outputs))


def operation(name: Operation, ndim: int, channels: int, stride: int, norm: Norm) -> nn.Module:
    """One operation from ``channels`` to ``channels``.

    skip: identity, with stride 2 a mean and a projection. avg3, max3: pools. conv3: a 3x3[x3] convolution. sep3, sep5:
    depthwise-separable ones. dil3: sep3 with gaps of one.
    """
    if name == "skip":
        if stride == 1:
            return nn.Identity()
        return nn.Sequential(AveragePool(ndim, stride), *project(ndim, channels, channels, norm))
    if name == "avg3":
        return nn.Sequential(AveragePool(ndim, stride), norm(channels))
    if name == "max3":
        return nn.Sequential(MAX_POOL[ndim](3, stride, 1), norm(channels))
    if name == "conv3":
        convolution = CONV[ndim](channels, channels, 3, stride, 1, bias=False)
        return nn.Sequential(nn.LeakyReLU(SLOPE), convolution, norm(channels))
    kernel, dilation = {"sep3": (3, 1), "sep5": (5, 1), "dil3": (3, 2)}[name]
    padding = dilation * (kernel - 1) // 2
    return nn.Sequential(
        nn.LeakyReLU(SLOPE),
        CONV[ndim](channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        CONV[ndim](channels, channels, 1, bias=False),
        norm(channels),
    )
