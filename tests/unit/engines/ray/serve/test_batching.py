"""Requests that run together."""

from __future__ import annotations

import numpy as np

from medray.engines.ray.serve.batching import run_together


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
