from __future__ import annotations

import pytest
import torch
from torch import nn

from medray.compress.prune import prune
from medray.config.schema import ModelConfig
from medray.errors import CompressionError
from medray.models.catalogue import build_model
from medray.models.narrow import narrow_to


def built(name, kind, ndim, side, **fields):
    torch.manual_seed(0)
    return build_model(
        ModelConfig(name=name, **fields),
        kind=kind,
        ndim=ndim,
        in_channels=1,
        num_outputs=3,
        patch_size=(side,) * ndim,
    ).eval()


@pytest.mark.parametrize(
    ("name", "kind", "ndim", "fields"),
    [
        ("unet", "segmentation", 3, {"feature_size": 16, "depth": 2}),
        ("small_cnn", "classification", 2, {"feature_size": 16}),
        ("resnet18", "classification", 2, {}),
    ],
)
def test_channels_are_really_gone_and_the_network_is_rebuilt(name, kind, ndim, fields):
    model, x = (
        built(name, kind, ndim, 32 if ndim == 2 else 16, **fields),
        torch.randn(1, 1, *(32 if ndim == 2 else 16,) * ndim),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cut = prune(model, 0.5, x, outputs=3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), "left as it was"
    assert cut.macs[1] < 0.35 * cut.macs[0] and cut.parameters[1] < 0.35 * cut.parameters[0]
    assert cut.parameters[1] == sum(p.numel() for p in cut.model.parameters())
    again = narrow_to(built(name, kind, ndim, x.shape[-1], **fields), cut.widths).eval()
    again.load_state_dict(cut.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), cut.model(x)) and again(x).shape == model(x).shape


def test_what_was_cut_can_be_cut_again():
    wide, x = built("small_cnn", "classification", 2, 32, feature_size=32), torch.randn(1, 1, 32, 32)
    once = prune(wide, 0.5, x, outputs=3)
    twice = prune(once.model, 0.5, x, outputs=3, wide=wide)
    again = narrow_to(built("small_cnn", "classification", 2, 32, feature_size=32), twice.widths)
    again.load_state_dict(twice.model.state_dict())
    assert twice.macs[1] < once.macs[1]


def test_too_narrow_a_network_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    with pytest.raises(CompressionError, match="nothing shrank"):
        prune(model, 0.3, torch.randn(1, 1, 16, 16), outputs=3)


def test_a_network_that_cannot_be_pruned_is_refused():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 3, 1)

        def forward(self, x):
            return self.last(self.first(x).reshape(len(x), 32, *x.shape[2:]) + torch.ones(1, 32, 1, 1))

    with pytest.raises(CompressionError, match="can't be pruned"):
        prune(Stubborn(), 0.5, torch.randn(1, 1, 16, 16), outputs=3)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_out_of_range_is_refused(ratio):
    with pytest.raises(CompressionError, match="between 0 and 1"):
        prune(nn.Conv2d(1, 3, 1), ratio, torch.randn(1, 1, 4, 4), outputs=3)
