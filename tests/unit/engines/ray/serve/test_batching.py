"""Requests that run together."""

from __future__ import annotations

import numpy as np

from medray.engines.ray.serve.batching import run_together
from medray.errors import ServingError


def test_arrays_of_one_shape_run_as_one_and_come_back_apart() -> None:
    runs = []

    def engine(batch):
        runs.append(batch.shape)
        return batch.reshape(len(batch), -1).sum(1, keepdims=True)

    arrays = [np.full((n, 1, 2, size), n, np.float32) for n, size in ((1, 2), (2, 3), (3, 2))]
    answers = run_together(engine, arrays, lambda *_: None)
    assert runs == [(4, 1, 2, 2), (2, 1, 2, 3)]
    assert [answer.shape for answer in answers] == [(1, 1), (2, 1), (3, 1)]
    assert answers[2][0, 0] == 3 * 4 and answers[1][0, 0] == 2 * 6


def test_one_that_fails_does_not_take_the_others_along() -> None:
    def engine(batch):
        if (batch < 0).any():
            raise ValueError("negative")
        return batch

    good, bad = np.ones((1, 2), np.float32), -np.ones((1, 2), np.float32)
    answers = run_together(engine, [good, bad, good], lambda *_: None)
    assert isinstance(answers[1], ValueError)
    assert np.array_equal(answers[0], good) and np.array_equal(answers[2], good)


def test_one_that_is_larger_than_the_budget_runs_in_parts() -> None:
    runs = []

    def engine(batch):
        runs.append(len(batch))
        return batch * 2

    array = np.arange(28, dtype=np.float32).reshape(7, 4)
    (answer,) = run_together(engine, [array], lambda *_: None, budget=12)
    assert runs == [3, 3, 1] and np.array_equal(answer, array * 2)
    runs.clear()
    run_together(engine, [array], lambda *_: None, budget=1)
    assert runs == [1] * 7


def test_an_engine_that_answers_other_rows_than_asked_gives_nobody_another_s() -> None:
    arrays = [np.full((1, 2), n, np.float32) for n in range(3)]
    answers = run_together(lambda batch: batch[:1], arrays, lambda *_: None)
    assert all(np.array_equal(answer, array) for answer, array in zip(answers, arrays, strict=True))
    (answer,) = run_together(lambda batch: batch[:1], [np.ones((2, 2), np.float32)], lambda *_: None)
    assert isinstance(answer, ServingError)
