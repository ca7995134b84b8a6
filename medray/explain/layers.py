"""Which layer's maps a class-activation map is made of, for networks of every family.

The rule: the deepest maps, that is the coarsest grid with more than one cell an axis, at the last module that gives
them (an activation where there is one) and is no head. That is the end of the last stage in a classifier and the
bottleneck in a U-Net, whose later maps show the answer rather than what it rests on (Vinogradova et al. 2020,
arXiv:2002.11434). Networks of tokens are told apart by what they are made of: their maps are the last block's tokens,
laid back on the patches' grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medray.errors import ModelError
from medray.models.variance import LogVariance


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer whose output is explained.

    Attributes:
        name: within the network.
        layer: the module.
        reshape: from its output to maps (B, C, *grid); None where it gives maps.
    """

    name: str
    layer: nn.Module
    reshape: Callable[[Tensor], Tensor] | None = None


def target_of(model: nn.Module, example: Tensor) -> Target:
    """The layer for a network.

    Args:
        model: one network, in evaluation mode.
        example: (1, C, *s), one input; the network runs once.

    Raises:
        ModelError: nothing in it gives maps.
    """
    ndim = example.ndim - 2
    while isinstance(model, LogVariance):
        model = model.model
    if _is_vit(model):
        return _tokens(model, example)
    if _is_swin(model):
        last = model.get_submodule("layers")[-1]  # type: ignore[index]
        return Target(name="layers.-1", layer=last, reshape=lambda out: out.movedim(-1, 1))
    seen: list[tuple[str, nn.Module, tuple[int, ...]]] = []  # with channels and grid
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and _is_map(output, example):
                seen.append((name, module, tuple(output.shape[1:])))

        handles.append(module.register_forward_hook(look))

    for name, module in model.named_modules():
        if name:
            watch(name, module)
    try:
        with torch.no_grad():
            outputs = model(example).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    seen = [entry for entry in seen if entry[2][0] != outputs]
    grids = [shape[1:] for _, _, shape in seen if min(shape[1:]) > 1]
    if not grids:
        raise ModelError(f"{type(model).__name__} has no layer whose maps could be shown on images of {ndim} axes")
    smallest = min(grids, key=math.prod)
    name, module, _ = next(entry for entry in reversed(seen) if entry[2][1:] == smallest)
    return Target(name=name, layer=module)


def _is_map(output: Tensor, example: Tensor) -> bool:
    """Whether (B, C, *grid) is the input's grid made coarser alike along all axes."""
    if output.ndim != example.ndim or len(output) != len(example):
        return False
    ratios = [n / m for n, m in zip(example.shape[2:], output.shape[2:], strict=True)]
    return min(ratios) >= 1 and max(ratios) <= 2 * min(ratios)


def _is_vit(model: nn.Module) -> bool:
    blocks, patches = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    return isinstance(blocks, nn.Sequential) and hasattr(patches, "grid_size") and hasattr(model, "num_prefix_tokens")


def _is_swin(model: nn.Module) -> bool:
    return type(model).__name__.startswith("SwinTransformer") and isinstance(
        getattr(model, "layers", None), nn.Sequential
    )


def _tokens(model: Any, example: Tensor) -> Target:
    """The input of the last block's first norm: its output has no gradient, but for the class token (timm's ViT)."""
    prefix, patch = int(model.num_prefix_tokens), model.patch_embed.patch_size
    grid = tuple(n // int(p) for n, p in zip(example.shape[2:], patch, strict=True))

    def reshape(out: Tensor) -> Tensor:
        return out[:, prefix:].transpose(1, 2).reshape(len(out), -1, *grid)

    return Target(name="blocks.-1.norm1", layer=model.blocks[-1].norm1, reshape=reshape)
