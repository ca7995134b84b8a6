"""SCAFFOLD against its formula, step by step, and what it can't be had with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medray.config.federation import FederationConfig
from medray.config.schema import Experiment
from medray.learn.aggregation.aggregator import Aggregator
from medray.learn.aggregation.scaffold import attach_correction, moved_control, parted, travelled
from medray.learn.schedules import Schedule

ROUNDS, STEPS, RATE = 5, 4, 0.1
EXPERIMENT = Experiment.model_validate(
    {
        "optim": {"name": "sgd", "lr": RATE, "momentum": 0.0},
        "federation": {"strategy": "scaffold", "rounds": ROUNDS, "local_steps": STEPS},
    }
)
ASKED = [(0, 1, 2), (0, 2), (1, 2), (0, 1, 2), (0, 1)]
"""Who takes part in each round."""


def data() -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Of three sites, whose least squares lie far apart."""
    rng = np.random.default_rng(0)
    found = []
    for site in range(3):
        x = rng.normal(size=(20, 3))
        found.append((x, x @ (rng.normal(size=3) * 2 + site)))
    return found


def by_the_formula() -> np.ndarray[Any, Any]:
    """Algorithm 1, option II, with a global step of 1, in numpy."""
    x, c = np.zeros(3), np.zeros(3)
    own = [np.zeros(3) for _ in range(3)]
    schedule = Schedule(EXPERIMENT.schedule)
    for number, asked in enumerate(ASKED):
        moves, controls = [], []
        for site in asked:
            features, target = data()[site]
            y, length = x.copy(), 0.0
            for step in range(STEPS):
                rate = RATE * schedule.factor(number * STEPS + step, ROUNDS * STEPS)
                gradient = 2 * features.T @ (features @ y - target) / len(target)
                y, length = y - rate * (gradient - own[site] + c), length + rate
            new = own[site] - c + (x - y) / length
            moves.append(y - x)
            controls.append(new - own[site])
            own[site] = new
        x = x + np.mean(moves, axis=0)
        c = c + len(asked) / 3 * np.mean(controls, axis=0)
    return x


def by_the_parts(cut: bool) -> np.ndarray[Any, Any]:
    """With the optimiser, the aggregator and what the sites keep; ``cut``: through the checkpoint after each round."""
    config, schedule = EXPERIMENT.federation, Schedule(EXPERIMENT.schedule)
    aggregator, weights = Aggregator(config), {"weight": np.zeros((1, 3), np.float64)}
    own: list[dict[str, Any]] = [{} for _ in range(3)]
    for number, asked in enumerate(ASKED):
        control = aggregator.control(weights)
        sent, told = parted({**weights, **{f"control/{name}": value for name, value in control.items()}})
        assert sent.keys() == told.keys() == {"weight"}
        updates = []
        for site in asked:
            features, target = (torch.from_numpy(part) for part in data()[site])
            model = nn.Linear(3, 1, bias=False).double()
            model.load_state_dict({"weight": torch.from_numpy(sent["weight"].copy())})
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            correction = {name: value - own[site].get(name, 0.0) for name, value in told.items()}
            attach_correction(optimizer, model, {name: torch.from_numpy(value) for name, value in correction.items()})
            for step in range(STEPS):
                optimizer.param_groups[0]["lr"] = RATE * schedule.factor(number * STEPS + step, ROUNDS * STEPS)
                optimizer.zero_grad()
                ((model(features)[:, 0] - target) ** 2).mean().backward()
                optimizer.step()
            update = {"weight": model.weight.detach().numpy() - sent["weight"]}
            own[site] = moved_control(own[site], told, update, travelled(EXPERIMENT, number))
            updates.append(update)
        share = len(asked) / 3
        weights = aggregator(weights, updates, [1.0] * len(asked), travelled=travelled(EXPERIMENT, number), share=share)
        if cut:
            state, aggregator = aggregator.state(), Aggregator(config)
            aggregator.load_state(state)
    return np.asarray(weights["weight"][0])


@pytest.mark.parametrize("cut", [False, True])
def test_the_trajectory_is_that_of_the_formula(cut: bool) -> None:
    found = by_the_parts(cut)
    assert np.abs(found - by_the_formula()).max() < 1e-9 and np.abs(found).max() > 0.1


def test_statistics_have_no_control_and_other_strategies_none_at_all() -> None:
    weights = {"w": np.ones(2, np.float32), "mean": np.ones(2, np.float32)}
    assert Aggregator(EXPERIMENT.federation, {"mean"}).control(weights).keys() == {"w"}
    assert Aggregator(FederationConfig()).control(weights) == {}
    still = moved_control({"w": np.ones(2)}, {"w": np.full(2, 9.0)}, {"w": np.ones(2)}, 0.0)
    assert still["w"].tolist() == [1.0, 1.0], "no learning rate, nothing learned"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"local_steps": None}, "set federation.local_steps"),
        ({"compression": "int8"}, "federation.compression"),
        ({"secure_aggregation": True, "quorum": 3}, "federation.secure_aggregation"),
        ({"privacy": {"epsilon": 1.0, "delta": 1e-3}}, "privacy.epsilon"),
    ],
)
def test_what_control_variates_can_not_be_told_from_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        FederationConfig.model_validate({"strategy": "scaffold", "local_steps": 2, **options})
