"""Legs of a training: together they are one."""

from __future__ import annotations

import pytest
import torch

from medray.learn.schedules import Schedule
from medray.train.leg import Leg, Rounds
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
