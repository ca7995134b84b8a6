"""Optimisers, schedules, EMA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from medray.config.schema import OptimConfig, ScheduleConfig
from medray.learn.ema import Ema
from medray.learn.optimizers import build_optimizer, parameter_groups
from medray.learn.schedules import Schedule


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def test_decay_spares_biases_norms_and_what_the_model_names() -> None:
    model = Tokens()
    decayed, free = parameter_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [model.conv.weight.shape]
    assert {id(p) for p in free["params"]} == {
        id(p) for p in (model.position, model.conv.bias, model.norm.weight, model.norm.bias)
    }
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_layer_decay_slows_what_lies_deep_below() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    blocks = [list(model[0].parameters()), list(model[1].parameters())]
    config = OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.1, layer_decay=0.5)
    optimizer = build_optimizer(model, config, blocks=blocks)
    found = {id(p): (g["scale"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for layer, scale in enumerate((0.25, 0.5, 1.0)):
        assert found[id(model[layer].weight)] == (scale, scale, 0.1)
        assert found[id(model[layer].bias)] == (scale, scale, 0.0)
    assert optimizer.param_groups[0]["scale"] == 1.0  # whose rate is shown
    again = build_optimizer(model, config, blocks=blocks)
    again.load_state_dict(optimizer.state_dict())
    assert [g["scale"] for g in again.param_groups] == [g["scale"] for g in optimizer.param_groups]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_each_optimiser_learns(name: Any, kind: type) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.05))
    assert isinstance(optimizer, kind)
    x = torch.randn(64, 3)
    losses = []
    for _ in range(50):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


def factors(total: int = 1000, **options: Any) -> list[float]:
    schedule = Schedule(ScheduleConfig(**options))
    return [schedule.factor(step, total) for step in range(total)]


@pytest.mark.parametrize("name", ["cosine", "poly", "cyclic", "warm_restarts"])
def test_ends_at_the_least_after_a_linear_warm_up(name: Any) -> None:
    found = factors(name=name, warmup=0.1, min_factor=0.05)
    assert found[0] == pytest.approx(found[99] / 100)
    assert found[-1] == pytest.approx(0.05)
    assert max(found) == pytest.approx(1.0, abs=0.02) and min(found[100:]) >= 0.05 - 1e-9


def test_shapes_by_hand() -> None:
    assert factors(name="cosine", warmup=0.0, min_factor=0.0, total=101)[50] == pytest.approx(0.5)
    assert factors(name="poly", warmup=0.0, min_factor=0.0, total=101)[50] == pytest.approx(0.5**0.9)
    cyclic = factors(name="cyclic", warmup=0.0, min_factor=0.0, cycles=2, total=101)
    assert cyclic[0] == 0 and cyclic[25] == pytest.approx(1) and cyclic[50] == pytest.approx(0)
    restarts = factors(name="warm_restarts", warmup=0.0, min_factor=0.0, cycles=3, total=7001)
    peaks = [i for i in range(1, 7001) if restarts[i] - restarts[i - 1] > 0.5]
    assert peaks == [1000, 3000]
    assert set(factors(name="constant", warmup=0.0)) == {1.0}


@pytest.mark.parametrize("name", ["cosine", "poly", "plateau", "cyclic", "warm_restarts", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs_have_a_positive_rate(name: Any, total: int) -> None:
    found = factors(name=name, total=total, warmup=1.0)
    assert all(math.isfinite(f) and 0 <= f <= 1 for f in found) and max(found) > 0


def test_plateau_halves_after_patience_and_remembers() -> None:
    config = ScheduleConfig(name="plateau", patience=2, warmup=0.0, min_factor=0.2)
    schedule = Schedule(config, "min")
    cuts = []
    for value in (1.0, 0.9, 0.95, float("nan"), 0.91, 0.8, 0.8, 0.8, 0.9, 0.9):
        schedule.observe(value)
        cuts.append(schedule.factor(0, 10))
    assert cuts == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.2]
    other = Schedule(config, "min")
    other.load_state_dict(schedule.state_dict())
    assert other.factor(0, 10) == 0.2


def test_ema_by_hand_and_swaps_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema(model, 0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.fill_(3.0)  # type: ignore[union-attr, operator]
    ema.update(model)
    own = model[0].weight.detach().clone()
    with ema.applied(model):
        # The first update's decay is (1 + 1) / (10 + 1), below the 0.5 asked for.
        assert torch.allclose(model[0].weight, start + 9 / 11)
        assert float(model[1].running_mean[0]) == 3.0  # type: ignore[index]
        averaged = model.state_dict()["0.weight"].clone()
    assert torch.equal(model[0].weight, own)
    other = Ema(model, 0.5)
    other.load_state_dict(ema.state_dict())
    with other.applied(model):
        assert torch.equal(model.state_dict()["0.weight"], averaged)
