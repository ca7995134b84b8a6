"""Networks with fewer channels than the catalogue's: told by the widths of their layers, rebuilt without unpickling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from medray.errors import ModelError
from medray.models.layers import InstanceNorm

Widths = Mapping[str, tuple[int, int, int]]
"""Layer's name to (inputs, outputs, groups); those alone that differ from the catalogue's network."""

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _of(layer: nn.Module) -> tuple[int, int, int] | None:
    """(inputs, outputs, groups) of a layer; None where it has no width of its own."""
    known: Any = layer
    if isinstance(layer, (*_CONV, *_TRANSPOSED)):
        return known.in_channels, known.out_channels, known.groups
    if isinstance(layer, nn.Linear):
        return known.in_features, known.out_features, 1
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return known.num_features, known.num_features, 1
    if isinstance(layer, InstanceNorm):
        return len(layer.weight), len(layer.weight), 1
    if isinstance(layer, nn.GroupNorm):
        return known.num_channels, known.num_channels, known.num_groups
    if isinstance(layer, nn.PReLU):
        return known.num_parameters, known.num_parameters, 1
    return None


def widths_of(narrow: nn.Module, wide: nn.Module) -> dict[str, tuple[int, int, int]]:
    """What of ``narrow`` differs from ``wide``, the catalogue's network that it was cut from.

    Raises:
        ModelError: a parameter changed its shape in a layer that can't be told by its widths.
    """
    found: dict[str, tuple[int, int, int]] = {}
    originals = dict(wide.named_modules())
    for name, layer in narrow.named_modules():
        mine, theirs = _of(layer), _of(originals[name])
        if mine is not None and mine != theirs:
            found[name] = mine
    shapes = {name: value.shape for name, value in narrow.state_dict().items()}
    for name, value in wide.state_dict().items():
        if shapes.get(name) != value.shape and name.rpartition(".")[0] not in found:
            raise ModelError(f"'{name}' changed its shape, but its layer is none that can be rebuilt from its widths")
    return found


def narrow_to(model: nn.Module, widths: Widths) -> nn.Module:
    """Cut the layers of a catalogue's network to ``widths``; their weights are left for the caller to load.

    The widths may come from a stranger: a layer only ever becomes smaller.

    Raises:
        ModelError: a layer that isn't there, has no width, or would grow.
    """
    layers = dict(model.named_modules())
    for name, (inputs, outputs, groups) in widths.items():
        layer = layers.get(name)
        have = None if layer is None else _of(layer)
        if layer is None or have is None:
            raise ModelError(f"the network has no layer '{name}' whose width could be set")
        if not (1 <= inputs <= have[0] and 1 <= outputs <= have[1] and 1 <= groups <= have[2]):
            raise ModelError(f"layer '{name}' of widths {have} can't become {(inputs, outputs, groups)}: only smaller")
        if inputs % groups or outputs % groups:
            raise ModelError(f"layer '{name}': widths {inputs}, {outputs} are no multiples of its {groups} groups")
        _cut(layer, inputs, outputs, groups)
    return model


def _cut(layer: nn.Module, inputs: int, outputs: int, groups: int) -> None:
    known: Any = layer

    def empty(name: str, *shape: int) -> None:
        value = getattr(known, name, None)
        if value is None:
            return
        fresh = torch.zeros(shape, dtype=value.dtype)
        if isinstance(value, nn.Parameter):
            setattr(known, name, nn.Parameter(fresh, requires_grad=value.requires_grad))
        else:
            setattr(known, name, fresh)

    if isinstance(layer, (*_CONV, *_TRANSPOSED)):
        first, second = (inputs, outputs) if isinstance(layer, _TRANSPOSED) else (outputs, inputs)
        empty("weight", first, second // groups, *known.kernel_size)
        empty("bias", outputs)
        known.in_channels, known.out_channels, known.groups = inputs, outputs, groups
    elif isinstance(layer, nn.Linear):
        empty("weight", outputs, inputs)
        empty("bias", outputs)
        known.in_features, known.out_features = inputs, outputs
    else:
        for name in ("weight", "bias", "running_mean", "running_var"):
            empty(name, outputs)
        if isinstance(layer, nn.GroupNorm):
            known.num_channels, known.num_groups = outputs, groups
        elif isinstance(layer, nn.PReLU):
            known.num_parameters = outputs
        elif not isinstance(layer, InstanceNorm):
            known.num_features = outputs
