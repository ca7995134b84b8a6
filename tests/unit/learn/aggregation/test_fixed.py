"""Whole numbers whose sum can't wrap around, and that say what the floats did, to half a step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medray.errors import FederationError
from medray.learn.aggregation.fixed import HEAVIEST, fixed_point, flat, shaped


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("sites", [3, 4, 7, 100, 1000])
def test_the_largest_sum_that_there_can_be_fits(sites: int, alike: bool) -> None:
    point = fixed_point(sites=sites, alike=alike)
    assert math.log2(point.step) == int(math.log2(point.step)), "a power of two: no float is rounded by it"
    assert sites * point.heaviest * round(point.reach / point.step) < 2 ** (point.bits - 1)
    assert sites * point.heaviest < 2 ** (point.bits - 1), "the weights' own sum, too"
    for end in (point.reach, -point.reach, 10 * point.reach):
        code = point.encode(np.array([end]), point.heaviest)
        total = np.zeros(2, code.dtype)
        for _ in range(sites):
            total += code
        found = point.decode(total, sites=sites)
        assert found is not None and found[1] == sites * point.heaviest
        assert found[0][0] == np.clip(end, -point.reach, point.reach)


@pytest.mark.parametrize("alike", [True, False])
def test_the_sum_of_codes_is_the_weighted_mean_to_half_a_step(alike: bool) -> None:
    rng = np.random.default_rng(0)
    point = fixed_point(sites=5, alike=alike)
    rows = rng.normal(0, 0.1, (5, 1000)).astype(np.float32)
    weights = [1] * 5 if alike else [3, 70_000, 1, 512, 40]
    kept = [min(weight, HEAVIEST) for weight in weights]
    total = sum(
        (point.encode(row, weight) for row, weight in zip(rows, kept, strict=True)), np.zeros(1001, point.dtype)
    )
    found = point.decode(total, sites=5)
    assert found is not None and found[1] == sum(kept)
    mean = (rows.astype(np.float64) * np.array(kept)[:, None]).sum(0) / sum(kept)
    assert np.abs(found[0] - mean).max() <= point.step / 2 * (1 + 1e-9)
    assert point.step < 2**-23, "finer than a float32 near 1"


def test_noise_is_no_sum_and_bad_weights_are_none() -> None:
    rng = np.random.default_rng(0)
    for alike in (True, False):
        point = fixed_point(sites=4, alike=alike)
        noise = rng.integers(0, 2**63, (200, 3), dtype=np.uint64).astype(point.dtype)
        assert all(point.decode(row, sites=4) is None for row in noise)
    with pytest.raises(FederationError, match="count for 0"):
        fixed_point(sites=4, alike=False).encode(np.zeros(1), 0)
    with pytest.raises(FederationError, match="count for 2"):
        fixed_point(sites=4, alike=True).encode(np.zeros(1), 2)
    with pytest.raises(FederationError, match="too many"):
        fixed_point(sites=100_000, alike=True)


def test_a_row_and_back() -> None:
    like = {"b": np.zeros((2, 3), np.float32), "a": np.zeros((), np.float32), "c": np.zeros(2, np.float32)}
    update = {
        name: np.random.default_rng(1).normal(size=value.shape).astype(np.float32) for name, value in like.items()
    }
    back = shaped(flat(update), like)
    assert list(back) == list(like) and all(np.array_equal(back[name], update[name]) for name in like)
    assert all(back[name].dtype == np.float32 for name in like)
