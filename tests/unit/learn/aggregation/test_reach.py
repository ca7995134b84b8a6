"""How far a first round can reach, against optimisers that go as far as they can."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medray.config.schema import Experiment
from medray.learn.aggregation.checks import beyond
from medray.learn.aggregation.reach import reach
from medray.learn.optimizers import build_optimizer
from medray.learn.schedules import Schedule

WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.5},
    "adam": {"name": "adam", "lr": 1e-2},
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip_norm": 1.0, "weight_decay": 0.1},
    "sgd that forgets nothing": {"name": "sgd", "lr": 0.1, "momentum": 1.0, "clip_norm": 1.0},
    "sgd without momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "clip_norm": 1.0},
}


def spec(**sections: Any) -> Experiment:
    return Experiment.model_validate({"federation": {"rounds": 5}, **sections})


def walked(experiment: Experiment, steps: int, gradient: Any) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
    """How far the real optimiser gets, and where it began."""
    torch.manual_seed(0)
    model = nn.Linear(40, 5)
    before = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    optimizer, schedule = build_optimizer(model, experiment.optim), Schedule(experiment.schedule)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = schedule.factor(step, steps * experiment.federation.rounds)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        for value in model.parameters():
            value.grad = gradient(step, value)
        nn.utils.clip_grad_norm_(model.parameters(), experiment.optim.clip_norm)
        optimizer.step()
    moved = [float(((value.detach().numpy() - before[name]) ** 2).sum()) for name, value in model.named_parameters()]
    return float(np.sqrt(sum(moved))), before


@pytest.mark.parametrize("steps", [1, 7, 200])
@pytest.mark.parametrize("way", WAYS)
def test_no_honest_round_reaches_farther_and_a_hundredfold_one_does(way: str, steps: int) -> None:
    experiment = spec(optim=WAYS[way])
    noise = torch.Generator().manual_seed(1)
    gradients = {
        "always the same way": lambda _, value: torch.full_like(value, 3.0),
        "at random": lambda _, value: torch.randn(value.shape, generator=noise),
        "seldom, and then steep": lambda step, value: torch.full_like(value, 1e4 if step % 50 == 49 else 1e-4),
    }
    for name, gradient in gradients.items():
        length, before = walked(experiment, steps, gradient)
        farthest = reach(experiment, before, steps)
        assert farthest is not None and beyond(length, farthest) is None, name
    steady, before = walked(experiment, steps, gradients["always the same way"])
    assert "in a first round" in str(beyond(100 * steady, reach(experiment, before, steps)))


def test_a_warm_up_reaches_less_and_what_bounds_nothing_says_so() -> None:
    weights = {"w": np.zeros(9, np.float32)}
    warm = spec(schedule={"warmup": 0.5}, federation={"rounds": 20})
    slow, fast = reach(warm, weights, 10), reach(spec(schedule={"warmup": 0.0}), weights, 10)
    assert slow is not None and fast is not None and slow < fast / 5
    later = reach(warm, weights, 10, number=9)  # the rounds before were discarded: the warm-up goes on all the same
    assert later is not None and slow < fast / 5 < later <= fast
    whole = reach(spec(optim={"lr": 0.1}), weights, 10**9)
    assert whole is not None and np.isfinite(whole)
    heavy = reach(spec(optim={"name": "sgd", "momentum": 1.0}), weights, 10**9)
    assert heavy is not None and np.isfinite(heavy)
    assert reach(spec(optim={"name": "sgd", "clip_norm": 0.0}), weights, 1) is None
    private = {"privacy": {"epsilon": 1.0}, "train": {"precision": "fp32"}}
    assert reach(spec(optim={"name": "sgd"}, **private), weights, 1) is None
    assert reach(spec(**private), weights, 1) is not None
    assert beyond(1e9, None) is None
