"""Compressed updates: how near, how small, and what a stranger may not send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from medray.errors import FederationError
from medray.learn.aggregation.compression import compress, decompress
from medray.learn.aggregation.mean import Weights


def update(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(40, 50)).astype(np.float32), "b": rng.normal(size=(7,)).astype(np.float32)}


def test_int8_is_near_and_a_quarter_of_the_bytes() -> None:
    sent, left = compress(update(), {}, "int8", 0.05)
    found = decompress(sent, update(), "int8")
    for name, value in update().items():
        assert np.abs(found[name] - value).max() <= np.abs(value).max() / 254 * 1.001
        assert_allclose(found[name] + left[name], value, atol=1e-6)
    assert sum(v.nbytes for v in sent.values()) < 0.27 * sum(v.nbytes for v in update().values())


def test_topk_sends_what_is_large_and_feeds_the_rest_back() -> None:
    residual: Weights = {}
    total = {name: np.zeros_like(value) for name, value in update().items()}
    for _ in range(60):
        sent, residual = compress(update(), residual, "topk", 0.05)
        assert sum(v.nbytes for v in sent.values()) < sum(v.nbytes for v in update().values()) / 12
        for name, value in decompress(sent, update(), "topk").items():
            total[name] += value
    # Without feedback the small entries would never arrive.
    for name, value in update().items():
        assert_allclose(total[name] + residual[name], 60 * value, atol=1e-2)
        assert np.corrcoef(total[name].ravel(), value.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("a", np.zeros(3, np.int8)),
        ("a", np.zeros(2000, np.float32)),
        ("a#scale", np.zeros(2, np.float32)),
        ("strange", np.zeros(1)),
    ],
)
def test_parts_that_do_not_fit_are_refused(part: str, value: Any) -> None:
    sent, _ = compress(update(), {}, "int8", 1.0)
    with pytest.raises(FederationError):
        decompress({**sent, part: value}, update(), "int8")


def test_places_beyond_the_array_are_refused() -> None:
    sent, _ = compress(update(), {}, "topk", 0.1)
    at = sent["a#at"].copy()
    at[0] = 10**6
    with pytest.raises(FederationError, match="beyond"):
        decompress({**sent, "a#at": at}, update(), "topk")
