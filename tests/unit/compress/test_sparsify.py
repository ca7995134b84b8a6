from __future__ import annotations

import pytest
import torch
from torch import nn

from medray.compress.sparsify import _lamp, settled, sparsify, zero_share
from medray.errors import CompressionError


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 3)
    )


def test_the_score_is_lamp_s():
    """By hand: of squares 1, 4, 9 the smallest is 1 of 14, the next 4 of 13, the largest all of itself."""
    torch.testing.assert_close(
        _lamp(torch.tensor([[-2.0, 1.0], [3.0, 0.0]])), torch.tensor([[4 / 13, 1 / 14], [1.0, 0.0]]).double()
    )


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_as_many_weights_as_asked_are_zero_and_no_layer_dies(share):
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = settled(sparsify(model, share))
    assert zero_share(sparse) == pytest.approx(share, abs=0.002)
    assert all(layer.weight.abs().sum() > 0 for layer in sparse if hasattr(layer, "kernel_size"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items()), "left as it was"
    assert sparse.state_dict().keys() == before.keys()
    for name, value in sparse.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], before[name][kept]), "what lives is as it was"


def test_each_of_many_small_layers_keeps_its_largest_weight():
    """More layers than weights are to be left: one of each stays, and the network still says something."""
    torch.manual_seed(0)
    sparse = settled(sparsify(nn.Sequential(*(nn.Linear(6, 6) for _ in range(40))), 0.98))
    assert all((layer.weight != 0).sum() >= 1 for layer in sparse)
    assert (sparse[0].weight != 0).sum() < 3


def test_within_a_layer_the_smallest_go():
    plain = nn.Sequential(nn.Linear(32, 8))
    (layer,) = settled(sparsify(plain, 0.5))
    gone, magnitude = layer.weight == 0, plain[0].weight.detach().abs()
    assert gone.sum() == 128 and magnitude[gone].max() < magnitude[~gone].min()


def test_zeros_stay_zero_while_the_rest_learns():
    masked = sparsify(network(), 0.7).train()
    zero = masked[3].weight == 0
    before = masked[3].weight.detach().clone()
    optimizer = torch.optim.AdamW(masked.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        masked(torch.randn(8, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    model = settled(masked).eval()
    assert torch.equal(model[3].weight == 0, zero) and not torch.equal(model[3].weight, before)
    assert zero_share(model) == pytest.approx(0.7, abs=0.002)


def test_what_is_sparse_can_be_made_sparser_but_not_less():
    half = settled(sparsify(network(), 0.5))
    more = settled(sparsify(half, 0.8))
    assert zero_share(more) == pytest.approx(0.8, abs=0.002)
    assert bool((more[3].weight[half[3].weight == 0] == 0).all())
    with pytest.raises(CompressionError, match="zero already"):
        sparsify(half, 0.4)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(CompressionError, match="between 0 and 1"):
        sparsify(network(), share)


def test_a_network_without_weights_is_refused():
    with pytest.raises(CompressionError, match="no convolution"):
        sparsify(nn.Sequential(nn.ReLU()), 0.5)
