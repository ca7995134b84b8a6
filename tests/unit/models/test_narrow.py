from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from medray.errors import ModelError
from medray.models.layers import InstanceNorm
from medray.models.narrow import narrow_to, widths_of


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        InstanceNorm(8),
        nn.ConvTranspose2d(8, 6, 2, 2),
        nn.GroupNorm(2, 6),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 2),
    )


def narrow():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        InstanceNorm(4),
        nn.ConvTranspose2d(4, 4, 2, 2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 2),
    )


def test_a_network_is_rebuilt_from_its_widths():
    torch.manual_seed(1)
    cut = narrow().eval()
    widths = widths_of(cut, wide())
    assert widths["0"] == (1, 4, 1) and widths["3"] == (4, 4, 4) and widths["6"] == (4, 4, 2)
    again = narrow_to(wide(), widths).eval()
    again.load_state_dict(cut.state_dict())
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(again(x), cut(x))
    assert again[0].out_channels == 4 and again[1].num_features == 4 and again[8].in_features == 256


def test_what_did_not_change_is_not_told():
    assert widths_of(wide(), wide()) == {}


def test_a_change_that_widths_cannot_tell_is_found():
    class Free(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(size))

    with pytest.raises(ModelError, match="position"):
        widths_of(Free(2), Free(4))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"nowhere": (1, 1, 1)}, "no layer 'nowhere'"),
        ({"7": (1, 1, 1)}, "no layer '7'"),
        ({"0": (1, 9, 1)}, "only smaller"),
        ({"0": (1, 10**9, 1)}, "only smaller"),
        ({"8": (385, 2, 1)}, "only smaller"),
        ({"3": (4, 4, 3)}, "no multiples"),
    ],
)
def test_a_stranger_s_widths_only_ever_cut(widths, message):
    model = wide()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=message):
        narrow_to(model, widths)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
