"""Where a study's wall clock went."""

from __future__ import annotations

import pytest

from medray.workflows.account import ITSELF, MEASURING, START, TRAINING, account
from tests.unit.workflows.test_selecting import trial

STAGES = {"data and plan": 20.0, "search": 100.0, "final fit": 60.0, "choice, report, bundle": 15.0}


def test_the_parts_add_up_and_the_search_is_divided() -> None:
    records = [trial(number, 0.5, 1.0, seconds=30.0, measuring=10.0 * (number == 0)) for number in range(4)]
    rows = {row.name: row.seconds for row in account(STAGES, 200.0, records, 2)}
    assert rows == {
        START: 5.0, "data and plan": 20.0, TRAINING: 60.0, MEASURING: 5.0, ITSELF: 35.0, "final fit": 60.0,
        "choice, report, bundle": 15.0,
    }  # fmt: skip
    assert sum(row.share for row in account(STAGES, 200.0, records, 2)) == pytest.approx(1.0)


def test_a_study_without_trials_has_nothing_to_divide() -> None:
    names = [row.name for row in account(STAGES, 200.0, [], 1)]
    assert names == [START, *STAGES]


def test_what_trials_of_a_killed_sitting_took_is_theirs() -> None:
    rows = {row.name: row.seconds for row in account({"search": 100.0}, 400.0, [trial(0, 0.5, 1.0, seconds=300.0)], 1)}
    assert rows == {START: 100.0, TRAINING: 300.0, MEASURING: 0.0, ITSELF: 0.0}
