"""Elastic networks: each level is what its fields say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medray.config.schema import ModelConfig
from medray.errors import ModelError
from medray.models.catalogue import build_model, lookup
from medray.models.elastic import MBConv, channels_of


def build(name, side=16, *, depth=3, ndim=2, **levels):
    config = ModelConfig(name=name, feature_size=8, depth=depth, elastic=levels)
    kind = lookup(name).kinds[0]
    return build_model(config, kind=kind, ndim=ndim, in_channels=1, num_outputs=2, patch_size=(side,) * ndim)


@pytest.mark.parametrize(("name", "ndim"), [("elastic_unet", 2), ("elastic_unet", 3), ("elastic_mbconv", 2)])
def test_a_level_is_what_its_fields_say(name, ndim):
    model = build(name, ndim=ndim, level1={"kernel": 7, "blocks": 3, "expansion": 2, "width": 0.5})
    level = (model.encoder if name == "elastic_unet" else model).levels[1]
    assert [type(part) for part in level] == [MBConv] * 3
    depthwise = [part for part in level.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d)) and part.groups > 1]
    assert [part.kernel_size[0] for part in depthwise] == [7] * 3
    assert [part.out_channels for part in depthwise] == [16, 16, 16]  # expansion 2 of 8, the level's width being half
    assert [part.stride[0] for part in depthwise] == [2, 1, 1]
    x = torch.randn(2, 1, *(16,) * ndim)
    assert model.train()(x).shape == ((2, 2, *(16,) * ndim) if name == "elastic_unet" else (2, 2))


def test_smaller_choices_make_smaller_networks():
    def size(**level):
        return sum(p.numel() for p in build("elastic_unet", level1=level, level2=level).parameters())

    assert size(width=0.5) < size() < size(expansion=6) and size(blocks=1) < size() < size(kernel=7)


def test_levels_beyond_the_sixth_are_as_the_sixth():
    config = ModelConfig(name="elastic_unet", elastic={"level5": {"width": 0.5}})
    assert channels_of(config, 8, 8, 2)[-3:] == [128, 256, 256]


def test_other_networks_have_no_such_fields():
    with pytest.raises(ModelError, match="has no field 'elastic'"):
        build("unet", level1={"kernel": 5})
    with pytest.raises(ValueError, match="kernel"):
        ModelConfig(name="elastic_unet", elastic={"level1": {"kernel": 4}})
