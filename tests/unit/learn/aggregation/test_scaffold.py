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
from medray.learn.aggregation.scaffold import attach_correction, parted, travelled
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
    """With the optimiser and the aggregator; ``cut``: through the checkpoint after each round.

    A site that isn't asked by the formula trains all the same: what comes too late has no part in anything.
    """
    config, schedule = EXPERIMENT.federation, Schedule(EXPERIMENT.schedule)
    aggregator, weights = Aggregator(config), {"weight": np.zeros((1, 3), np.float64)}
    for number, asked in enumerate(ASKED):
        updates = {}
        for site in range(3):
            more = aggregator.correction(weights, f"s/{site}")
            sent, correction = parted({**weights, **{f"correction/{name}": value for name, value in more.items()}})
            assert sent.keys() == correction.keys() == {"weight"}
            features, target = (torch.from_numpy(part) for part in data()[site])
            model = nn.Linear(3, 1, bias=False).double()
            model.load_state_dict({"weight": torch.from_numpy(sent["weight"].copy())})
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            attach_correction(optimizer, model, {name: torch.from_numpy(value) for name, value in correction.items()})
            for step in range(STEPS):
                optimizer.param_groups[0]["lr"] = RATE * schedule.factor(number * STEPS + step, ROUNDS * STEPS)
                optimizer.zero_grad()
                ((model(features)[:, 0] - target) ** 2).mean().backward()
                optimizer.step()
            updates[site] = {"weight": model.weight.detach().numpy() - sent["weight"]}
        weights = aggregator(
            weights,
            [updates[site] for site in asked],
            [1.0] * len(asked),
            sites=[f"s/{site}" for site in asked],
            travelled=travelled(EXPERIMENT, number),
        )
        if cut:
            state, aggregator = aggregator.state(), Aggregator(config)
            aggregator.load_state(state)
    return np.asarray(weights["weight"][0])


@pytest.mark.parametrize("cut", [False, True])
def test_the_trajectory_is_that_of_the_formula(cut: bool) -> None:
    found = by_the_parts(cut)
    assert np.abs(found - by_the_formula()).max() < 1e-9 and np.abs(found).max() > 0.1


def test_corrections_cancel_out_over_the_sites_that_are_known() -> None:
    """By the weights that their updates have; whoever is missing from a round, and whoever is new, biases nobody."""
    rng, counts = np.random.default_rng(0), {"a": 10.0, "b": 30.0, "c": 20.0}
    aggregator, weights = Aggregator(EXPERIMENT.federation), {"w": np.zeros(4, np.float32)}
    for there in ("ab", "b", "ac", "abc", "c"):
        updates = [{"w": rng.normal(size=4).astype(np.float32)} for _ in there]
        aggregator(weights, updates, [counts[name] for name in there], sites=there, travelled=0.4)
        known = [name for name in "abc" if np.any(aggregator.correction(weights, name)["w"])]
        total = sum(counts[name] * aggregator.correction(weights, name)["w"].astype(float) for name in known)
        assert np.abs(total).max() < 1e-4
        if there == "ab":
            assert known == ["a", "b"], "c is not corrected by what nobody knows"
    assert known == ["a", "b", "c"]


def test_statistics_have_no_control_and_other_strategies_none_at_all() -> None:
    weights = {"w": np.ones(2, np.float32), "mean": np.ones(2, np.float32)}
    aggregator = Aggregator(EXPERIMENT.federation, {"mean"})
    assert aggregator.correction(weights, "a").keys() == {"w"}
    assert Aggregator(FederationConfig()).correction(weights, "a") == {}
    for travelled_, factor in ((1.0, 1), (0.0, 100)):  # no learning rate, nothing learned
        updates = [{name: factor * sign * value for name, value in weights.items()} for sign in (1, -1)]
        aggregator(weights, updates, [1.0, 1.0], sites="ab", travelled=travelled_)
        assert aggregator.correction(weights, "a")["w"].tolist() == [1.0, 1.0]


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
