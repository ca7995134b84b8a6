from __future__ import annotations

import random

import pytest

from medray.search.budget import SHORTEST_TRIAL, SMALLEST_SHARE, Budget, expected_cost, plan_budget
from medray.search.pruning import RUNGS, asha


def plan(total: float = 1200.0, **changes: object) -> Budget:
    settings = {"trials": 40, "search_share": 0.4, "concurrency": 1, "pruner": "asha", "start_up": 20.0, "finish": 30.0}
    return plan_budget(total, **(settings | changes))  # type: ignore[arg-type]


def test_the_parts_add_up() -> None:
    budget = plan()
    assert 20.0 + budget.search + budget.final + budget.finish == pytest.approx(1200.0)
    assert budget.search == pytest.approx(0.4 * 1150.0)


@pytest.mark.parametrize("pruner", ["curve", "asha", "median", "none"])
@pytest.mark.parametrize("total", [120.0, 600.0, 1200.0, 7200.0])
def test_trials_are_of_a_sensible_length_and_fit(total: float, pruner: str) -> None:
    budget = plan(total, pruner=pruner)
    assert budget.trial >= min(budget.search, max(SHORTEST_TRIAL, SMALLEST_SHARE * budget.search)) - 1e-9
    assert expected_cost(budget.trials - 1, pruner) * budget.trial + budget.trial <= budget.search + 1e-6


def test_fewer_trials_are_longer() -> None:
    assert plan(trials=5).trial > plan(trials=20).trial
    assert plan(trials=5).trials == 5


def test_early_stops_and_concurrency_make_room() -> None:
    found = [plan(pruner=pruner).trials for pruner in ("asha", "curve", "median", "none")]
    assert found == sorted(set(found), reverse=True)
    assert plan(600.0, concurrency=2, pruner="none").trials > plan(600.0, pruner="none").trials


def test_a_resumed_study_has_what_is_left() -> None:
    fresh, resumed, late = plan(), plan(spent=220.0), plan(spent=800.0)
    assert resumed.search == pytest.approx(fresh.search - 200.0)
    assert resumed.final == pytest.approx(fresh.final)
    assert late.search == 0.0 and late.trials == 0
    assert late.final == pytest.approx(1200.0 - 30.0 - 800.0)


def test_hardly_any_time_gives_the_default_alone() -> None:
    budget = plan(66.0)
    assert (budget.trials, budget.trial) == (1, budget.search)
    assert plan(30.0).final == 0.0


def test_no_search_where_trials_would_tell_nothing() -> None:
    """Of trials that have to last 200 s, 460 s of search hold two full ones: their time goes to the final fit."""
    none, some = plan(shortest=200.0), plan(shortest=100.0)
    assert (none.search, none.trial, none.trials) == (0.0, 0.0, 0)
    assert none.final == pytest.approx(1200.0 - 20.0 - 30.0)
    assert some.trial >= 100.0 and some.trials >= 3
    assert plan(shortest=200.0, trials=2).trials == 2  # who asks for two gets two


def test_measuring_is_paid_for_by_the_search() -> None:
    """Twelve networks of 20 s each: what trials train for is what these leave."""
    for pruner in ("none", "curve"):
        free, every = plan(pruner=pruner), plan(pruner=pruner, measuring=20.0)
        few = plan(pruner=pruner, measuring=20.0, networks=3)
        assert free.search == every.search == few.search
        assert free.trial * free.trials > few.trial * few.trials > every.trial * every.trials
        for budget, networks in ((every, every.trials), (few, 3)):
            training = (expected_cost(budget.trials - 1, pruner) + 1.0) * budget.trial
            assert training + 20.0 * networks + budget.trials <= budget.search + 1e-6


def test_expected_cost_is_that_of_the_rule() -> None:
    """Trials in random order, judged by the rule itself, cost on average what the plan counts with."""
    generator, costs = random.Random(0), []
    for _ in range(100):
        curves: dict[int, list[tuple[float, tuple[float, ...]]]] = {}
        cost = 0.0
        for number in range(20):
            loss = generator.random()
            curves[number], done = [], 0.0
            for fraction in (*RUNGS, 1.0):
                curves[number].append((fraction, (loss,)))
                done = fraction
                if number and asha(curves, number):
                    break
            cost += done
        costs.append(cost)
    assert sum(costs) / len(costs) == pytest.approx(expected_cost(20, "asha"), rel=0.1)
