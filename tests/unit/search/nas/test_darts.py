"""DARTS: its gradients against a reference, what it derives, and that it finds an operation that alone can do it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from medray.config.genotype import OPERATIONS
from medray.config.schema import NasConfig
from medray.models.cells import Plan
from medray.search.nas.darts import Darts, derive, unrolled_gradient
from medray.search.nas.strategy import Problem
from medray.search.nas.supernet import SuperNetwork, edges_of
from medray.train.runtime import LocalRuntime


def problem(kind="classification", **config):
    torch.manual_seed(0)
    plan = Plan(ndim=2, in_channels=1, num_outputs=2, nodes=2, width=2, depth=2, extent=8)
    return Problem(
        net=SuperNetwork(kind, plan).train(),
        criterion=nn.CrossEntropyLoss(),
        runtime=LocalRuntime(),
        precision="fp32",
        config=NasConfig(strategy="darts", nodes=2, **config),
    )


def batch(seed, kind="classification"):
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(6, 1, 8, 8, generator=draw)
    target = (image.mean((1, 2, 3)) > 0).long() if kind == "classification" else (image[:, 0] > 0).long()
    return {"image": image, "target": target}


# The gradient through a step of the weights --------------------------------------------------------------------------


def bilinear():
    """Losses whose optimum moves with the architecture, in double precision."""
    draw = torch.Generator().manual_seed(3)
    A, B, C = (torch.randn(4, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    a, w = (torch.randn(4, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))

    def train_loss():
        return (torch.tanh(A @ w) * a).sum() ** 2 + (w * (B @ a)).sum()

    def held_loss():
        return ((C @ w - a) ** 2).sum() + (w**2 * a).sum()

    return a, w, train_loss, held_loss


@pytest.mark.parametrize("with_momentum", [False, True])
def test_the_second_order_gradient_is_that_of_the_unrolled_step(with_momentum):
    rate, decay, mu = 0.03, 3e-4, 0.9
    a, w, train_loss, held_loss = bilinear()
    buffer = torch.full_like(w, 0.2).detach() if with_momentum else None
    before = w.detach().clone()
    got = unrolled_gradient([a], [w], train_loss, held_loss, rate=rate, momenta=[buffer], momentum=mu, decay=decay)[0]
    assert torch.equal(w, before)

    def unrolled(at):
        """L_held(w'(a), a) by autograd through the step, a graph of its own."""
        a.data.copy_(at)
        (step,) = torch.autograd.grad(train_loss(), w)
        moved = w - rate * (step + decay * w + (mu * buffer if buffer is not None else 0.0))
        kept = w.data.clone()
        w.data.copy_(moved)
        value = held_loss().detach()
        w.data.copy_(kept)
        return value

    here, h = a.detach().clone(), 1e-5
    wanted = torch.stack([
        (unrolled(here + h * unit) - unrolled(here - h * unit)) / (2 * h) for unit in torch.eye(4, dtype=torch.float64)
    ])  # fmt: skip
    a.data.copy_(here)
    first_order = torch.autograd.grad(held_loss(), a)[0]
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
    assert (first_order - wanted).abs().max() > 20 * (got - wanted).abs().max()  # the second order is what is right


def test_where_nothing_can_be_unrolled_the_first_order_stands():
    a, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    got = unrolled_gradient([a], [w], lambda: (w * a).sum(), lambda: (a**2).sum() + 0 * w.sum(), rate=0.1)
    assert torch.equal(got[0], 2 * a.detach())


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_a_step_moves_weights_and_architecture_and_goes_on_after_a_checkpoint(order, kind):
    one, other = Darts(problem(kind, order=order)), Darts(problem(kind, order=order))
    before = {name: alpha.detach().clone() for name, alpha in one.alphas.items()}
    weights = [w.detach().clone() for w in one.weights]
    figures = one.step(batch(0, kind), batch(1, kind), 0.5)
    assert set(figures) == {"held_loss", "train_loss", "skips"}
    assert all(not torch.equal(alpha, before[name]) for name, alpha in one.alphas.items())
    assert any(not torch.equal(w, kept) for w, kept in zip(one.weights, weights, strict=True))
    other.load_state_dict(deepcopy(one.state_dict()))
    assert one.step(batch(2, kind), batch(3, kind), 0.6) == other.step(batch(2, kind), batch(3, kind), 0.6)


def test_the_weights_learn_alone_at_first_and_the_auxiliary_skip_fades():
    darts = Darts(problem())
    alphas = [alpha.detach().clone() for alpha in darts.alphas.values()]
    assert "held_loss" not in darts.step(batch(0), batch(1), 0.0)
    assert darts.net.board.auxiliary == 1.0
    assert all(torch.equal(a, b) for a, b in zip(darts.alphas.values(), alphas, strict=True))
    darts.step(batch(0), batch(1), 1.0)
    assert darts.net.board.auxiliary == pytest.approx(0.0)
    plain = Darts(problem(auxiliary_skip=False))
    plain.step(batch(0), batch(1), 0.0)
    assert plain.net.board.auxiliary == 0.0


# What is derived -----------------------------------------------------------------------------------------------------


def alphas(*strong):
    """(edges, operations) of three nodes, with the given (edge, operation, strength) above the rest."""
    table = torch.zeros(len(edges_of(3)), len(OPERATIONS))
    for edge, name, value in strong:
        table[edge, OPERATIONS.index(name)] = value
    return table


def test_a_node_keeps_its_two_strongest_edges_with_their_strongest_operation():
    table = alphas((0, "conv3", 2.0), (1, "max3", 1.0), (3, "sep5", 3.0), (4, "dil3", 2.0), (5, "avg3", 1.0),
                   (8, "conv3", 1.0))  # fmt: skip
    found = derive("classification", {"normal": table, "reduce": table}, None)
    assert found.cells["normal"][0] == ((0, "conv3"), (1, "max3"))
    assert found.cells["normal"][1] == ((1, "sep5"), (2, "dil3"))
    assert (3, "conv3") in found.cells["normal"][2] and (0, "avg3") in found.cells["normal"][2]


def test_a_cell_has_no_more_skips_than_allowed_and_loses_the_weakest():
    table = alphas(
        *((edge, "skip", 3.0 + 0.1 * edge) for edge in range(9)), *((edge, "conv3", 1.0) for edge in range(9))
    )

    def skips(most):
        nodes = derive("segmentation", {"down": table, "up": table}, most).cells["up"]
        return [(number, source) for number, node in enumerate(nodes) for source, name in node if name == "skip"]

    assert len(skips(None)) == 6
    assert skips(2) == [(2, 2), (2, 3)]
    assert skips(0) == []


def test_it_finds_the_operation_without_which_nothing_can_be_learnt():
    """Targets are local contrasts: pools and skips see none of them, convolutions do."""
    case = problem("segmentation", architecture_lr=0.05)
    darts = Darts(case)
    draw = torch.Generator().manual_seed(0)
    for step in range(15):
        image = torch.randn(4, 1, 8, 8, generator=draw)
        edges = image - nn.functional.avg_pool2d(image, 3, 1, 1)
        one = {"image": image[:2], "target": (edges[:2, 0] > 0).long()}
        darts.step(one, {"image": image[2:], "target": (edges[2:, 0] > 0).long()}, 0.2 + step / 50)
    shares = darts.alphas["up"].detach().softmax(-1).mean(0)
    learning = sum(float(shares[OPERATIONS.index(name)]) for name in ("conv3", "sep3", "sep5", "dil3"))
    assert learning > 4 / 7 + 0.02
