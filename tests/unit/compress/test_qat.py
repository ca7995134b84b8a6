from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from medray.bundle.export import to_onnx
from medray.compress.qat import Rounded, RoundedActivation, RoundedWeight
from medray.compress.quantize import quantize_static
from medray.compress.sparsify import settled, sparsify, zero_share
from medray.errors import CompressionError
from medray.predict.onnx_runtime import OnnxPredictor


class Net(nn.Module):
    """Two convolutions, of which the first has a batch norm, and a linear layer: (B, 1, 8, 8) to (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu_(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        made.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.1, 3.0, -0.5, 1.0, 7.0, 0.02]))
    made.train()
    for _ in range(20):  # statistics of its own, so that folding means something
        made(torch.randn(16, 1, 8, 8) * 2 + 1)
    return made.eval()


def cases(count=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 1, 8, 8, generator=generator) * 2 + 1 for _ in range(count)]


def test_a_range_moves_once_where_a_batch_is_seen_with_and_without_gradients():
    """Losses over the batch run its parts twice, first without gradients."""
    rounding = RoundedActivation().train()
    batch = torch.tensor([-1.0, 3.0])
    with torch.no_grad():
        rounding(batch)
    assert rounding.low == 0 and rounding.high == 0
    rounding(batch)
    assert rounding.low == pytest.approx(-0.01) and rounding.high == pytest.approx(0.03)


def test_weights_are_those_of_the_int8_file(net, tmp_path):
    """Per channel, also where a batch norm is folded in: what training rounds is what the quantiser writes."""
    given = cases()
    to_onnx(net, tmp_path / "net.onnx", example=given[0])
    quantize_static(tmp_path / "net.onnx", tmp_path / "int8.onnx", (case.numpy() for case in given))
    rounded = Rounded(net, given)
    held = [
        numpy_helper.to_array(tensor).astype(np.float32)
        for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert len(held) == 2
    for layer in (rounded.network.first, rounded.network.second):
        mine = layer.weight.detach()
        steps = mine / (mine.abs().amax((1, 2, 3), keepdim=True) / 127)
        signs = torch.sign(net.norm.weight.detach()).reshape(-1, 1, 1, 1) if layer is rounded.network.first else 1
        assert any(other.shape == mine.shape and np.abs(other - (steps * signs).numpy()).max() <= 1 for other in held)


def test_it_answers_as_the_int8_engine_does(net, tmp_path):
    given = cases()
    to_onnx(net, tmp_path / "net.onnx", example=given[0])
    quantize_static(tmp_path / "net.onnx", tmp_path / "int8.onnx", (case.numpy() for case in given))
    batch = torch.cat(given[:4])
    engine = OnnxPredictor(tmp_path / "int8.onnx", threads=1, precision="int8")(batch.numpy())
    with torch.no_grad():
        plain, mine = net(batch).numpy(), Rounded(net, given)(batch).numpy()
    assert np.abs(mine - plain).max() > 0, "it rounds"
    assert np.abs(mine - engine).max() < 0.6 * np.abs(engine - plain).max() + 0.01


def test_only_training_moves_ranges_and_norms_stay(net):
    rounded = Rounded(net, cases())
    ends = [(float(one.low), float(one.high)) for one in rounded.ranges]
    assert all(low <= 0 <= high for low, high in ends) and len(ends) == 6
    rounded(torch.full((1, 1, 8, 8), 500.0))
    assert ends == [(float(one.low), float(one.high)) for one in rounded.ranges]
    mean = net.norm.running_mean.clone()
    rounded.train()
    assert rounded.training and not rounded.network.norm.training
    rounded(torch.full((1, 1, 8, 8), 500.0))
    assert float(rounded.ranges[0].high) > ends[0][1]
    assert torch.equal(rounded.network.norm.running_mean, mean)


def test_gradients_pass_the_rounding_but_not_the_ends():
    weight = torch.randn(4, 3, 2, 2, requires_grad=True)
    RoundedWeight(0)(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    one = RoundedActivation().eval()
    one.low.fill_(-1.0), one.high.fill_(1.0)
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], requires_grad=True)
    y = one(x)
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0] and y.max() < 1.02 and y[2] == 0


def test_the_plain_network_has_the_names_and_the_trained_weights(net):
    before = copy.deepcopy(net.state_dict())
    rounded = Rounded(net, cases()).train()
    optimizer = torch.optim.SGD(rounded.parameters(), lr=0.1)
    rounded(torch.cat(cases())).square().sum().backward()
    optimizer.step()
    trained = rounded.network.first.parametrizations.weight.original.detach().clone()
    again = Rounded(net, cases())
    again.load_state_dict(rounded.state_dict())
    plain = again.plain()
    assert plain.state_dict().keys() == before.keys()
    assert torch.equal(plain.first.weight, trained) and not torch.equal(trained, before["first.weight"])
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items()), "left as it was"
    with torch.no_grad():
        assert plain(cases()[0]).shape == (1, 2)


def test_training_wins_back_what_rounding_costs():
    """Beside one large weight the small ones of its channel round to nothing; training finds what stands in."""
    torch.manual_seed(0)
    x = torch.rand(512, 65)
    model = nn.Sequential(nn.Linear(65, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.3)[0, 0] = 100.0
        target = model(x)

    def error(network):
        with torch.no_grad():
            return float((network.eval()(x) - target).square().mean())

    rounded = Rounded(model, [x])
    before = error(rounded)
    assert error(model) == 0 and before > 10
    optimizer = torch.optim.Adam(rounded.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        (rounded.train()(x) - target).square().mean().backward()
        optimizer.step(), schedule.step()
    # As it is quantised in the end: rounded anew, with ranges measured anew.
    assert error(rounded) < 0.05 * before and error(Rounded(rounded.plain(), [x])) < 0.05 * before


def test_what_is_sparse_stays_so(net):
    sparse = settled(sparsify(net, 0.5))
    rounded = Rounded(sparse, cases()).train()
    optimizer = torch.optim.AdamW(rounded.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        rounded(torch.cat(cases())).square().sum().backward()
        optimizer.step()
    assert zero_share(rounded.plain()) == pytest.approx(0.5, abs=0.02)


def test_no_layer_and_no_case_are_refused(net):
    with pytest.raises(CompressionError, match="no calibration case"):
        Rounded(net, iter(()))
    with pytest.raises(CompressionError, match="no convolution"):
        Rounded(nn.ReLU(), cases())
