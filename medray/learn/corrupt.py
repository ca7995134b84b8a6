"""The fixed corruptions by which a report measures robustness.

After Hendrycks and Dietterich 2019 (arXiv:1903.12261), those that acquisition brings: noise, blur, loss of contrast and
of resolution, each in three severities. They scale with the image's own spread and count in pixels, so they suit any
modality, before or after normalisation, in 2-D and 3-D.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corruption", "corrupt"]

Corruption = Literal["noise", "blur", "contrast", "low_resolution"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SEVERITIES = (1, 2, 3)

NOISE = (0.1, 0.2, 0.4)
"""Standard deviation of white Gaussian noise over the channel's own."""
BLUR = (0.7, 1.2, 2.0)
"""Standard deviation of a Gaussian, in pixels."""
CONTRAST = (0.7, 0.5, 0.3)
"""Factor of the distance to the channel's mean."""
LOW_RESOLUTION = (1.5, 2.0, 3.0)
"""Factor by which each axis loses pixels before it is blown up again."""


def corrupt(image: Tensor, name: Corruption, severity: int, *, seed: int = 0) -> Tensor:
    """A corrupted copy of one image.

    Args:
        image: (C, *spatial) float32, 2 or 3 spatial axes.
        name: which of :data:`CORRUPTIONS`.
        severity: 1 (mild), 2 or 3 (strong).
        seed: of the noise; the same image, name, severity and seed give the same result on any device.

    Raises:
        ValueError: an unknown name or severity, or another number of axes.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"corruption {name!r} of severity {severity}: there are {', '.join(CORRUPTIONS)}, of 1, 2 and 3"
        )
    if image.ndim not in (3, 4):
        raise ValueError(f"an image has shape (C, *spatial) with 2 or 3 spatial axes, not {tuple(image.shape)}")
    methods: dict[Corruption, Callable[[Tensor, int], Tensor]] = {
        "noise": lambda x, level: _noise(x, NOISE[level], zlib.crc32(f"{seed} {level}".encode())),
        "blur": lambda x, level: _blur(x, BLUR[level]),
        "contrast": lambda x, level: _contrast(x, CONTRAST[level]),
        "low_resolution": lambda x, level: _low_resolution(x, LOW_RESOLUTION[level]),
    }
    return methods[name](image.float(), severity - 1)


def _noise(image: Tensor, level: float, seed: int) -> Tensor:
    # Drawn on the CPU: a GPU's generator gives other numbers.
    generator = torch.Generator().manual_seed(seed)
    spread = image.flatten(1).std(1, correction=0).view(-1, *[1] * (image.ndim - 1))
    return image + level * spread * torch.randn(image.shape, generator=generator).to(image.device)


def _contrast(image: Tensor, factor: float) -> Tensor:
    mean = image.flatten(1).mean(1).view(-1, *[1] * (image.ndim - 1))
    return mean + factor * (image - mean)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Separable, edges repeated."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    for axis in range(1, image.ndim):
        line = image.movedim(axis, -1)
        shape = line.shape
        rows = F.pad(line.reshape(-1, 1, shape[-1]), (radius, radius), mode="replicate")
        image = F.conv1d(rows, kernel.view(1, 1, -1)).view(shape).movedim(-1, axis)
    return image.contiguous()


def _low_resolution(image: Tensor, factor: float) -> Tensor:
    """Averaged to fewer pixels, then interpolated back."""
    shape = tuple(image.shape[1:])
    small = tuple(max(1, round(size / factor)) for size in shape)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    few = F.interpolate(image[None], small, mode="area")
    return F.interpolate(few, shape, mode=mode, align_corners=False)[0]
