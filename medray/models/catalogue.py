"""The catalogue: which networks there are, and how one is built by name.

A new network is a file with ``SPECS`` and one line in ``FAMILIES``.
"""

from __future__ import annotations

import difflib
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from medray.config.schema import ModelConfig
from medray.errors import ModelError
from medray.models import (
    bisenet,
    deeplab,
    elastic,
    encoders,
    genotypes,
    medvit,
    monai_nets,
    small,
    swin,
    tabular,
    timm_nets,
    unet,
    unetpp,
    vit_unets,
)
from medray.models.dropout import set_dropout_kind
from medray.models.norms import group_norms
from medray.models.spec import ModelSpec, Request
from medray.models.variance import LogVariance
from medray.models.weights import hub_weights, load_weights
from medray.tasks.catalogue import find_task

FAMILIES = (
    unet.SPECS,
    unetpp.SPECS,
    monai_nets.SPECS,
    swin.SPECS,
    vit_unets.SPECS,
    deeplab.SPECS,
    encoders.SPECS,
    bisenet.SPECS,
    small.SPECS,
    elastic.SPECS,
    timm_nets.SPECS,
    medvit.SPECS,
    tabular.SPECS,
)
CATALOGUE: dict[str, ModelSpec] = {spec.name: spec for family in FAMILIES for spec in family}
"""Every network by name. Beside them, ``timm:NAME`` classifies with, and ``encoder:NAME`` segments under a U-Net
decoder by, any network of timm; ``genotype:...`` is one that an architecture search found."""


def names(kind: str | None = None, ndim: int | None = None) -> tuple[str, ...]:
    """Names of the catalogue that do the task ``kind`` on ``ndim``-D images, in the catalogue's order.

    Raises:
        ConfigError: there is no such task.
    """
    dense = None if kind is None else find_task(kind).dense
    return tuple(
        spec.name for spec in CATALOGUE.values() if dense in (None, spec.dense) and (ndim is None or ndim in spec.ndims)
    )


def lookup(name: str) -> ModelSpec:
    """The entry of that name.

    Raises:
        ModelError: there is none; the message has the nearest names.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    prefix, colon, inner = name.partition(":")
    if colon and prefix == "timm":
        return timm_nets.any_backbone(inner)
    if colon and prefix == "encoder":
        return encoders.any_encoder(inner)
    if colon and prefix == "genotype":
        return genotypes.any_genotype(inner)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), CATALOGUE, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise ModelError(
        f"there is no model '{name}'. {hint}List them with: medray models. "
        f"Any timm network can be had as 'timm:NAME' (classification) or 'encoder:NAME' (2-D segmentation)"
    )


def build_model(
    config: ModelConfig,
    *,
    kind: str,
    ndim: int,
    in_channels: int,
    num_outputs: int,
    patch_size: tuple[int, ...] | None,
) -> nn.Module:
    """Build the network that ``config`` names.

    Args:
        config: name, width, depth and so on; ``pretrained`` is None (random weights, no network access), ``"hub"``, or
        a
            local ``.safetensors`` file.
        kind: the task.
        ndim: spatial axes, 2 or 3.
        in_channels: channels C of the input (B, C, *spatial).
        num_outputs: O of the logits, (B, O), or (B, O, *spatial) of a dense task; see ``Task.outputs``.
        patch_size: spatial shape that it will be trained on; decides stems and token grids. None for unknown.

    Returns:
        the network. In segmentation with ``deep_supervision`` and in training mode, ``forward`` gives a list of
        logits, full resolution first. With ``log_variance`` and in training mode there are 2 K channels: see
        :class:`~medray.models.variance.LogVariance`.

    Raises:
        ModelError: an unknown name, or something that this network can't do.
    """
    spec = lookup(config.name)
    for what, value in (("in_channels", in_channels), ("num_outputs", num_outputs)):
        if value < 1:
            raise ModelError(f"{what}={value} for model '{config.name}': it must be at least 1")
    spec.check(config, kind=kind, ndim=ndim, patch_size=patch_size)
    hub = config.pretrained == "hub"
    if hub and not (spec.hub and ndim == 2):
        raise ModelError(
            f"the hub has no {ndim}-D weights for '{config.name}'. Give a local .safetensors file in "
            f"model.pretrained, or leave it out"
        )
    if config.pretrained and not hub and not config.pretrained.endswith(".safetensors"):
        raise ModelError(f"model.pretrained='{config.pretrained}' is neither 'hub' nor a local .safetensors file")
    request = Request(
        config=config,
        ndim=ndim,
        in_channels=in_channels,
        num_outputs=2 * num_outputs if config.log_variance else num_outputs,
        patch_size=patch_size,
        feature_size=config.feature_size or spec.feature_size or 0,
        depth=spec.resolved_depth(config, ndim),
        hub=hub,
    )
    with hub_weights(config.name) if hub else nullcontext():
        model = spec.build(request)
    if config.norm == "group":
        model = group_norms(model)
    if config.pretrained and not hub:
        load_weights(model, Path(config.pretrained))
    if config.dropout_kind is not None:
        set_dropout_kind(model, config.dropout_kind)
    return LogVariance(model, num_outputs) if config.log_variance else model


@lru_cache(maxsize=256)
def count_parameters(name: str, ndim: int, *, in_channels: int = 1, num_outputs: int = 2) -> int:
    """Trainable parameters of a catalogue entry as it comes. Nothing is allocated (PyTorch's meta device)."""
    spec = lookup(name)
    with torch.device("meta"):
        model = build_model(
            ModelConfig(name=name),
            kind=spec.kinds[0],
            ndim=ndim,
            in_channels=in_channels,
            num_outputs=num_outputs,
            patch_size=None,
        )
    return sum(part.numel() for part in model.parameters() if part.requires_grad)
