"""Where a network's encoder ends, and the blocks that it is made of, in order of depth."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from medray.errors import ModelError

__all__ = ["encoder_blocks", "encoder_parts"]

_ENCODERS = (
    ("encoder",),
    ("backbone",),
    ("context",),
    ("input_block", "downsamples", "bottleneck"),
    ("convInit", "down_layers"),
    ("embed", "embed_norm", "down", "merges"),
)
"""What networks that segment call the parts of their encoder; the first set that a network has in full is it."""
MOST = 25
"""Blocks: as many as ViT-L has, its embedding counted."""
_WITHIN = ("blocks", "layers", "levels")
"""What vendors' stages call the list of their blocks."""


def encoder_parts(model: nn.Module) -> list[nn.Module]:
    """The modules that make up the encoder; of a classifier all but the last one, its head.

    Raises:
        ModelError: the network has one part only.
    """
    network = _unwrapped(model)
    for names in _ENCODERS:
        if all(isinstance(getattr(network, name, None), nn.Module) for name in names):
            return [network.get_submodule(name) for name in names]
    parts = [child for child in network.children() if _owns(child)]
    if len(parts) < 2:
        raise ModelError(
            f"{type(network).__name__} has no encoder that could be told from its head: leave optim.layer_decay at 1 "
            "and train.freeze_epochs at 0, or choose another model"
        )
    return parts[:-1]


def encoder_blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    """The encoder's parameters, block by block in the network's own order, the first one next to the image.

    A block is what a network lists as one (a residual block, a transformer's layer). Norms that stand alone go with the
    block before; parameters of the network itself, such as position embeddings, with the first. There are ``MOST`` at
    most: of deeper networks, neighbours are put together, as ConvNeXt's training does (Liu et al. 2022).

    Raises:
        ModelError: see :func:`encoder_parts`.
    """
    parts = encoder_parts(model)
    network = _unwrapped(model)
    blocks = [list(network.parameters(recurse=False))]
    fresh = True  # the first block is still waited for
    seen = {id(parameter) for parameter in blocks[0]}
    for part in parts if len(parts) > 1 else _opened(parts[0]):
        for piece in _pieces(part):
            own = [p for p in piece if id(p) not in seen]
            seen.update(map(id, own))
            if not own:
                continue
            if fresh or all(p.ndim <= 1 for p in own):
                blocks[-1] += own
                fresh = fresh and all(p.ndim <= 1 for p in own)
            else:
                blocks.append(own)
    blocks = [block for block in blocks if block]
    count = min(len(blocks), MOST)
    edges = [place * len(blocks) // count for place in range(count + 1)]
    return [[p for block in blocks[a:b] for p in block] for a, b in pairwise(edges)]


def _opened(part: nn.Module) -> list[nn.Module]:
    """An encoder of a class of its own is no single block, whatever it calls its lists."""
    inner = _unwrapped(part)
    return [part] if any(True for _ in inner.parameters(recurse=False)) else list(inner.children())


def _pieces(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Parameters of a module, cut where it lists blocks."""
    listed = type(module) in (nn.Sequential, nn.ModuleList) or isinstance(module, nn.ModuleDict)
    listed = listed or any(isinstance(getattr(module, n, None), (nn.Sequential, nn.ModuleList)) for n in _WITHIN)
    # A wrapper around one network: its parts are that network's.
    parts = [child for child in module.children() if _owns(child)]
    own = list(module.parameters(recurse=False))
    if not listed and not (len(parts) == 1 and not own):
        yield list(module.parameters())
        return
    if own:
        yield own
    for part in parts:
        yield from _pieces(part)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network within modules that hold nothing but it."""
    while not any(True for _ in model.parameters(recurse=False)):
        parts = [child for child in model.children() if _owns(child)]
        if len(parts) != 1:
            break
        model = parts[0]
    return model


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
