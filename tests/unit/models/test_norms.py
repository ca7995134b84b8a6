"""Group normalisation in place of batch normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medray.config.schema import ModelConfig
from medray.models.catalogue import CATALOGUE, build_model
from medray.models.norms import group_norms, has_batch_norm

HEAVY = {"vit_l", "vit_b", "efficientnet_b7"}


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in HEAVY])
def test_no_network_of_the_catalogue_keeps_a_batch_norm(name: str) -> None:
    spec = CATALOGUE[name]
    with torch.device("meta"):
        model = build_model(
            ModelConfig(name=name, norm="group"),
            kind=spec.kinds[0],
            ndim=spec.ndims[0],
            in_channels=1,
            num_outputs=3,
            patch_size=None,
        )
    assert not has_batch_norm(model)


def test_values_names_and_what_follows_a_norm_stay() -> None:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 24, 1), BatchNormAct2d(24), nn.BatchNorm2d(24, affine=False))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
    names, weight = set(dict(model.named_parameters())), model[1].weight
    assert has_batch_norm(model) and not has_batch_norm(group_norms(model))
    assert set(dict(model.named_parameters())) == names and model[1].weight is weight
    x = torch.randn(2, 24, 5, 5)
    expected = torch.relu(nn.functional.group_norm(x, 4, weight, model[1].bias))
    torch.testing.assert_close(model[1](x), expected)


@pytest.mark.parametrize(("channels", "groups"), [(64, 16), (256, 32), (40, 8), (3, 1), (16, 4), (17, 1)])
def test_groups_divide_the_channels_and_are_never_thin(channels: int, groups: int) -> None:
    twin = group_norms(nn.BatchNorm2d(channels))
    assert isinstance(twin, nn.GroupNorm) and twin.num_groups == groups
