"""Intervals: coverage, pairing, groups."""

from __future__ import annotations

import numpy as np
import pytest

from medray.learn.intervals import bootstrap, paired_bootstrap
from medray.learn.metrics import binary_auc


def test_covers_the_mean_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        _, low, high = bootstrap(rng.exponential(size=40), np.mean, n=400, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_groups_widen_the_interval_of_repeated_cases() -> None:
    rng = np.random.default_rng(0)
    patients = rng.normal(size=30)
    values, groups = np.repeat(patients, 10), np.repeat(np.arange(30), 10)
    alone = bootstrap(values, n=500)
    grouped = bootstrap(values, groups=groups, n=500)
    single = bootstrap(patients, n=500)
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.15)


def test_pairing_sees_a_small_steady_difference() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(0.8, 0.1, 60)
    a = b + rng.normal(0.01, 0.005, 60)
    value, low, high = paired_bootstrap(a, b, n=500)
    assert value == pytest.approx(0.01, abs=0.003) and 0 < low < value < high < 0.02


def test_arrays_are_drawn_together_and_undefined_draws_left_out() -> None:
    labels, score = np.array([0, 0, 0, 0, 1]), np.array([0.1, 0.2, 0.3, 0.6, 0.5])
    value, low, high = bootstrap((labels, score), binary_auc, n=300, method="percentile")
    assert value == 0.75 and 0 <= low <= 0.75 <= high <= 1


def test_is_repeatable_and_bca_shifts_a_skewed_statistic() -> None:
    values = np.random.default_rng(0).exponential(size=30) ** 2
    one = bootstrap(values, np.mean, seed=3, n=1000)
    assert one == bootstrap(values, np.mean, seed=3, n=1000)
    plain = bootstrap(values, np.mean, seed=3, n=1000, method="percentile")
    assert one.low > plain.low and one.high > plain.high


def test_one_patient_has_no_interval_and_a_constant_has_no_width() -> None:
    assert np.isnan(bootstrap(np.array([0.5, 0.6]), groups=["a", "a"]).low)
    assert bootstrap(np.ones(5), n=50) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="one row per case"):
        bootstrap((np.ones(3), np.ones(4)))
