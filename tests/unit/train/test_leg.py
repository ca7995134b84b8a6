"""Legs of a training: together they are one, and FedProx's pull follows its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medray.learn.schedules import Schedule
from medray.train.leg import Leg, Rounds, pull_towards
from tests.unit.train.test_fit import Blobs, experiment, network, run


def test_rounds_go_through_the_same_batches_as_one_long_run() -> None:
    whole, parts = [], []
    loader = Blobs(batches=3)
    for epoch in range(4):
        loader.set_epoch(epoch)
        whole += [batch["image"] for batch in loader]
    for number in range(6):
        leg = Rounds(Blobs(batches=3), Leg(number, 6), steps=2, epochs=9)
        assert len(leg) == 2
        parts += [batch["image"] for batch in leg]
    assert len(parts) == len(whole) == 12
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_schedule_spans_all_legs() -> None:
    spec = experiment(train__epochs=1)
    found = []
    for number in range(5):
        loader = Rounds(Blobs(), Leg(number, 5), steps=None, epochs=1)
        result = run(spec, loader=loader, leg=Leg(number, 5))
        found.append(result.history[-1]["lr"])
    schedule = Schedule(spec.schedule)
    assert found == pytest.approx([0.01 * schedule.factor(4 * n + 3, 20) for n in range(5)])
    assert found[-1] < 0.05 * found[0]


def test_legs_draw_differently_and_each_the_same_again() -> None:
    spec = experiment(train__epochs=1)
    weights = [run(spec, leg=Leg(number, 2), model=network()).weights["0.weight"] for number in (0, 1, 0)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
    with pytest.raises(ValueError, match="leg 2 of 2"):
        Leg(2, 2)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_pull_is_the_formula(name: str) -> None:
    """g + mu (w - w_global), against optimisers written out in float64."""
    torch.manual_seed(1)
    x, y, mu, lr = torch.randn(20, 3).double(), torch.randn(20, 1).double(), 0.7, 0.05
    model = nn.Linear(3, 1).double()
    anchors = [p.detach().clone() for p in model.parameters()]
    kind = torch.optim.SGD(model.parameters(), lr=lr) if name == "sgd" else torch.optim.AdamW(model.parameters(), lr=lr)
    pull_towards(kind, list(model.parameters()), anchors, mu)
    w, b = anchors[0].clone(), anchors[1].clone()
    first, second = [torch.zeros_like(w), torch.zeros_like(b)], [torch.zeros_like(w), torch.zeros_like(b)]
    for step in range(1, 31):
        kind.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        kind.step()
        error = x @ w.T + b - y
        gradients = [2 * (error.T @ x) / 20 + mu * (w - anchors[0]), 2 * error.mean(0) + mu * (b - anchors[1])]
        for place, (value, gradient) in enumerate(zip((w, b), gradients, strict=True)):
            if name == "sgd":
                value -= lr * gradient
                continue
            value *= 1 - lr * 1e-2
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient**2
            root = (second[place] / (1 - 0.999**step)).sqrt() + 1e-8
            value -= lr * first[place] / (1 - 0.9**step) / root
    found = torch.cat([p.detach().ravel() for p in model.parameters()])
    assert torch.allclose(found, torch.cat([w.ravel(), b.ravel()]), atol=1e-5)
    assert not math.isclose(float(found[0]), float(anchors[0][0, 0]))
