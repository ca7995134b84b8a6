"""Helpers follow the measured wait; threads give what was asked for, in order."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from medray.data.ahead import DEPTH, Helpers, in_threads, usable_cpus


def epochs(helpers: Helpers, rates: dict[int, float], shares: dict[int, float], count: int = 12) -> list[int]:
    """How many helpers work in each of ``count`` epochs of 20 s, if so many bring such a rate and such a wait."""
    seen = []
    for _ in range(count):
        seen.append(helpers.number)
        helpers.observe(20 * rates[helpers.number], 20.0, 20 * shares[helpers.number])
    return seen


def test_without_a_wait_nothing_changes() -> None:
    assert set(epochs(Helpers(0, 8), {0: 100}, {0: 0.04})) == {0}


def test_more_helpers_come_while_they_pay() -> None:
    rates, shares = {1: 100.0, 2: 190.0, 4: 300.0, 7: 301.0}, {1: 0.7, 2: 0.4, 4: 0.2, 7: 0.2}
    seen = epochs(Helpers(1, 7), rates, shares)
    # Two epochs each, the first of which pays for the start; seven are no faster than four.
    assert seen == [1, 1, 2, 2, 4, 4, 7, 7, 4, 4, 4, 4]


def test_helpers_that_take_the_cores_that_train_go_again_for_good() -> None:
    assert epochs(Helpers(0, 1), {0: 100.0, 1: 80.0}, {0: 0.2, 1: 0.0}, 8) == [0, 0, 1, 1, 0, 0, 0, 0]


def test_they_stop_where_the_wait_does() -> None:
    assert epochs(Helpers(0, 8), {0: 100.0, 1: 125.0}, {0: 0.2, 1: 0.01}, 8) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_short_epochs_are_judged_together() -> None:
    helpers, seen = Helpers(0, 2), []
    for _ in range(6):
        seen.append(helpers.number)
        helpers.observe(100, 4.0, 2.0)
    assert seen == [0, 0, 0, 0, 1, 1]  # one to start, three make ten seconds


def test_a_fixed_number_stays() -> None:
    assert set(epochs(Helpers(3, 3), {3: 1.0}, {3: 0.9})) == {3}


def test_threads_keep_the_order_and_are_ahead_by_so_much() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def make(key: int) -> tuple[int, int]:
        begun.append(key)
        if key:
            gate.wait(20)
        time.sleep(0.01 if key % 2 else 0.0)
        return key, torch.get_num_threads()

    made = in_threads(make, itertools.count(), 2)
    assert next(made) == (0, 1)
    time.sleep(0.05)
    assert len(begun) <= 1 + 2 and max(begun) <= DEPTH * 2
    gate.set()
    assert [key for key, _ in itertools.islice(made, 20)] == list(range(1, 21))
    made.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert max(begun) <= 21 + 2 * DEPTH + 1


def test_what_a_thread_raises_arrives() -> None:
    def make(key: int) -> int:
        if key == 2:
            raise ValueError("case 7 is broken")
        return key

    made = in_threads(make, range(5), 2)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="case 7"):
        next(made)


def test_a_training_has_the_cores_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert usable_cpus() == 1
