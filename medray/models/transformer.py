"""Transformer parts for two and three axes.

Shape legend: tokens are (B, N, D); a grid of tokens is (B, *grid, D) with D channels last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.models.layers import DropPath, resize

_OUTSIDE = -1e4
"""Added to the scores of pairs that may not see each other; finite, so that bf16 and empty rows stay sound."""


class MLP(nn.Sequential):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

    def __init__(self, dim: int, heads: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim, 4 * dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PositionEmbedding(nn.Module):
    """A learnt vector per token of a base grid, resampled linearly for another grid."""

    def __init__(self, dim: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, dim, *grid))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, *grid) plus positions."""
        if x.shape[2:] == self.table.shape[2:]:
            return x + self.table
        return x + resize(self.table, x.shape[2:])


# The two tables are NumPy arrays: a tensor made while torch.export traces would be a fake one, and stay in the cache.
@lru_cache(maxsize=64)
def _relative_index(window: tuple[int, ...], nominal: int) -> npt.NDArray[np.int64]:
    """(N * N) rows of the bias table, one for each pair of the window's places."""
    places = np.array(list(itertools.product(*(range(n) for n in window))))
    offsets = places[:, None] - places[None] + nominal - 1
    powers = (2 * nominal - 1) ** np.arange(len(window))[::-1]
    return (offsets * powers).sum(-1).reshape(-1)


@lru_cache(maxsize=64)
def _shift_mask(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """(windows, 1, N, N): 0 where two places were neighbours before the cyclic shift, else ``_OUTSIDE``."""
    region = np.zeros(grid, dtype=np.int64)
    for axis, (size, width, by) in enumerate(zip(grid, window, shift, strict=True)):
        place = np.arange(size)
        part = (place >= size - width).astype(np.int64) + (place >= size - by) if by else np.zeros_like(place)
        region = region * 3 + part.reshape([-1 if a == axis else 1 for a in range(len(grid))])
    ndim = len(grid)
    cut = region.reshape([n for g, w in zip(grid, window, strict=True) for n in (g // w, w)])
    groups = cut.transpose([*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2)]).reshape(-1, math.prod(window))
    return np.where(groups[:, None, None] == groups[:, None, :, None], np.float32(0), np.float32(_OUTSIDE))


def _windows(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, *grid, D) to (B, windows, N, D)."""
    ndim = len(window)
    for axis in range(ndim):
        at = 1 + 2 * axis
        x = x.unflatten(at, (x.shape[at] // window[axis], window[axis]))
    order = [0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1]
    return x.permute(order).flatten(ndim + 1, 2 * ndim).flatten(1, ndim)


def _join(x: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """(B, windows, N, D) back to (B, *grid, D)."""
    ndim = len(window)
    x = x.unflatten(2, window).unflatten(1, tuple(g // w for g, w in zip(grid, window, strict=True)))
    order = [0]
    for axis in range(ndim):
        order += [1 + axis, 1 + ndim + axis]
    x = x.permute(*order, 2 * ndim + 1)
    for axis in range(ndim):
        x = x.flatten(1 + axis, 2 + axis)
    return x


class WindowBlock(nn.Module):
    """Swin's block: attention within windows, every other time shifted by half a window (Liu et al. 2021,
    arXiv:2103.14030).

    A window never exceeds the grid; a grid that is no multiple of it is padded for the attention.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, *, window: int, shifted: bool, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.heads, self.window, self.shifted, self.dropout = heads, window, shifted, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** ndim, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.mlp = MLP(dim, 4 * dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, D) to the same."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        shape = tuple(int(n) for n in x.shape[1:-1])
        ndim, axes = len(shape), list(range(1, len(shape) + 1))
        window = tuple(min(self.window, n) for n in shape)
        grid = tuple(-(-n // w) * w for n, w in zip(shape, window, strict=True))
        shift = tuple(w // 2 if self.shifted and g > w else 0 for w, g in zip(window, grid, strict=True))
        if grid != shape:
            x = F.pad(x, [0, 0, *itertools.chain(*((0, g - n) for n, g in zip(shape[::-1], grid[::-1], strict=True)))])
        if any(shift):
            x = torch.roll(x, [-s for s in shift], axes)
        x = _join(self._within(_windows(x, window), grid, window, shift), grid, window)
        if any(shift):
            x = torch.roll(x, list(shift), axes)
        for axis in range(ndim):
            x = x.narrow(axis + 1, 0, shape[axis])
        return x

    def _within(self, x: Tensor, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> Tensor:
        """Attention over N of (B, windows, N, D)."""
        query, key, value = self.qkv(x).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        index = torch.from_numpy(_relative_index(window, self.window)).to(x.device)
        bias = self.bias[index].unflatten(0, (x.shape[2], x.shape[2])).permute(2, 0, 1)[None]
        if any(shift):
            bias = bias + torch.from_numpy(_shift_mask(grid, window, shift)).to(x.device)
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1) + bias[None]
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return self.out((weights.to(value.dtype) @ value).transpose(2, 3).flatten(3))


class PatchMerging(nn.Module):
    """Halve the grid, double the width: neighbours side by side, normed, through one linear layer."""

    def __init__(self, ndim: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2**ndim * dim)
        self.reduce = nn.Linear(2**ndim * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, D) to (B, *grid / 2, 2 D)."""
        pairs = _windows(x, (2,) * (x.dim() - 2))  # (B, windows, 2**ndim, D)
        return self.reduce(self.norm(pairs.flatten(2))).unflatten(1, tuple(int(n) // 2 for n in x.shape[1:-1]))


class PatchExpanding(nn.Module):
    """Refine the grid by ``factor`` per axis: one linear layer, its channels dealt out in space (Cao et al. 2021)."""

    def __init__(self, ndim: int, dim: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor**ndim * outputs, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, D) to (B, *grid * factor, outputs)."""
        ndim = x.dim() - 2
        x = self.expand(x).unflatten(-1, (self.factor,) * ndim + (-1,))
        order = [0]
        for axis in range(ndim):
            order += [1 + axis, 1 + ndim + axis]
        x = x.permute(*order, 2 * ndim + 1)
        for axis in range(ndim):
            x = x.flatten(1 + axis, 2 + axis)
        return self.norm(x)
