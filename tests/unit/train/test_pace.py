"""The plan of steps, with a clock of our own."""

from __future__ import annotations

import itertools

import pytest

from medray.train.pace import Pace, validation_steps


def simulate(
    budget: float, step: float, validation: float, *, slower_at: float = 1e9, factor: float = 3.0
) -> tuple[Pace, float, int]:
    """Run a plan on a machine with these costs; steps cost ``factor`` times as much after ``slower_at`` seconds."""
    pace = Pace(epochs=100_000, steps_per_epoch=10, budget=budget, validate_every=None, timed=True)
    clock, done, count = 0.0, 0, 0
    while True:
        cost = step * (factor if clock > slower_at else 1)
        clock, done = clock + cost, done + 1
        pace.ticked(cost, done, clock)
        if pace.due(done):
            clock, count = clock + validation, count + 1
            pace.validated(validation)
            if pace.fixed and done >= pace.total:
                return pace, clock, count
            pace.revise(*pace.times(), done, clock)
            if done >= pace.total:
                return pace, clock, count
        elif done % max(1, pace.total // 40) == 0:
            pace.revise(*pace.times(), done, clock)
            if done >= pace.total:
                return pace, clock + validation, count + 1


@pytest.mark.parametrize("step", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("validation", [0.0, 1.0, 8.0, 30.0])
def test_the_budget_is_kept(step: float, validation: float) -> None:
    pace, clock, count = simulate(300.0, step, validation)
    assert 300 * 0.95 - 2 * step <= clock <= 300 * 1.01 + step
    assert pace.corrections == []
    assert 2 <= count <= 14 and (count <= 2 or count * validation <= 0.2 * 300)


@pytest.mark.parametrize("factor", [0.3, 3.0])
@pytest.mark.parametrize("slower_at", [30.0, 100.0, 250.0])
def test_it_is_corrected_when_the_machine_changes(factor: float, slower_at: float) -> None:
    pace, clock, _ = simulate(300.0, 0.1, 2.0, slower_at=slower_at, factor=factor)
    assert pace.corrections and 300 * 0.9 < clock <= 300 * 1.05


def test_a_budget_shorter_than_a_step_trains_one() -> None:
    pace, _, count = simulate(1.0, 5.0, 5.0)
    assert pace.total == 1 and count == 1


def test_validations_come_closer_towards_the_end() -> None:
    steps = validation_steps(1000, 12)
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert len(steps) == 12 and steps[-1] == 1000 and gaps == sorted(gaps, reverse=True)
    assert validation_steps(3, 12) == [1, 2, 3]
    assert validation_steps(1, 1) == [1]


def test_epochs_between_validations_are_kept_to() -> None:
    pace = Pace(epochs=10, steps_per_epoch=7, budget=None, validate_every=4, timed=True)
    assert [s for s in range(1, 71) if pace.due(s)] == [28, 56, 70]


def test_costly_validations_are_thinned_out_unless_deterministic() -> None:
    for timed, expected in ((True, 3), (False, 12)):
        pace = Pace(epochs=100, steps_per_epoch=10, budget=None, validate_every=None, timed=timed)
        count = 0
        for done in range(1, 1001):
            pace.ticked(0.1, done, 0.1 * done)
            if pace.due(done):
                count += 1
                pace.validated(10.0)
                pace.revise(*pace.times(), done, 0.1 * done)
        assert count == expected


def test_a_resumed_plan_is_the_same() -> None:
    pace, _, _ = simulate(300.0, 0.1, 2.0, slower_at=100)
    other = Pace(epochs=1, steps_per_epoch=10, budget=300.0, validate_every=None, timed=True)
    other.load_state_dict(pace.state_dict())
    assert other.state_dict() == pace.state_dict() and other.corrections


def test_epochs_end_a_run_that_has_time_to_spare() -> None:
    pace = Pace(epochs=3, steps_per_epoch=10, budget=1000.0, validate_every=None, timed=True)
    for step in range(1, 31):
        pace.ticked(0.1, step, 0.1 * step)
        if pace.due(step):
            pace.validated(0.1)
            pace.revise(*pace.times(), step, 0.1 * step)
    assert pace.total == 30
