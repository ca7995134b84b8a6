"""Aggregation against formulas written out, and against what must not move it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from medray.config.federation import FederationConfig
from medray.errors import FederationError
from medray.learn.aggregation.aggregator import Aggregator
from medray.learn.aggregation.checks import fault, norm, too_long, unreal, usual_norm
from medray.learn.aggregation.mean import Weights, mean
from medray.learn.aggregation.robust import krum, median, trimmed_mean


def updates(count: int, seed: int = 0) -> list[Weights]:
    rng = np.random.default_rng(seed)
    return [
        {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=()).astype(np.float32)}
        for _ in range(count)
    ]


def zeros() -> Weights:
    return {"a": np.zeros((3, 2), np.float32), "b": np.zeros((), np.float32)}


def test_the_mean_counts_cases() -> None:
    one, two = updates(2)
    found = mean([one, two], [30, 10])
    for name in one:
        assert_allclose(found[name], 0.75 * one[name] + 0.25 * two[name], rtol=1e-6)
        assert found[name].dtype == np.float32 and found[name].shape == one[name].shape


def test_robust_aggregates_ignore_one_bad_site() -> None:
    good = updates(6)
    bad = {name: np.full_like(value, 1e6) for name, value in good[0].items()}
    for found in (median([*good, bad]), trimmed_mean([*good, bad], 0.2)):
        assert all(np.abs(found[name]).max() < 4 for name in found)
    assert krum([*good, bad], 1) != 6
    plain = np.sort(np.stack([u["a"] for u in good]), axis=0)[1:5].mean(axis=0)
    assert_allclose(trimmed_mean(good, 0.2)["a"], plain, rtol=1e-5)
    assert all(np.abs(value).max() < 4 for value in trimmed_mean([*good[:3], bad], 0.2).values())
    assert_allclose(trimmed_mean(good[:2], 0.2)["a"], (good[0]["a"] + good[1]["a"]) / 2, rtol=1e-5)


def test_krum_takes_the_update_in_the_crowd() -> None:
    crowd = [{"w": np.array([1.0, x], np.float32)} for x in (0.0, 0.1, 0.2, 9.0, -7.0)]
    assert krum(crowd, 1) in (0, 1, 2)
    with pytest.raises(FederationError, match="at least 4"):
        krum(crowd[:3], 1)


@pytest.mark.parametrize("rule", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_servers_follow_the_papers_formula(rule: str) -> None:
    config = FederationConfig.model_validate({"strategy": rule, "server_lr": 0.1, "tau": 0.01})
    aggregator, weights = Aggregator(config), zeros()
    x, m, v = np.zeros((3, 2)), np.zeros((3, 2)), np.full((3, 2), 0.01**2)
    for turn in range(4):
        each = updates(3, seed=turn)
        delta = sum(u["a"].astype(np.float64) for u in each) / 3
        beta = 0.0 if rule == "fedadagrad" else 0.9
        m = beta * m + (1 - beta) * delta
        if rule == "fedadagrad":
            v = v + delta**2
        elif rule == "fedadam":
            v = 0.99 * v + 0.01 * delta**2
        else:
            v = v - 0.01 * delta**2 * np.sign(v - delta**2)
        x = x + 0.1 * m / (np.sqrt(v) + 0.01)
        weights = aggregator(weights, each, [1, 1, 1])
    assert_allclose(weights["a"], x, atol=1e-6)


def test_an_adaptive_server_goes_on_from_its_state_and_averages_statistics() -> None:
    config = FederationConfig(strategy="fedadam")
    one, two = Aggregator(config, {"b"}), Aggregator(config, {"b"})
    first = one(zeros(), updates(2), [1, 1])
    assert_allclose(first["b"], mean(updates(2), [1, 1])["b"], rtol=1e-6)
    two.load_state(one.state())
    again = updates(2, seed=5)
    left, right = one(first, again, [1, 3]), two(first, again, [1, 3])
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_every_fault_of_form_is_named() -> None:
    good = updates(1)[0]
    assert fault(good, zeros()) is None
    assert "lacks 'b'" in str(fault({"a": good["a"]}, zeros()))
    assert "unknown 'c'" in str(fault({**good, "c": good["a"]}, zeros()))
    assert "shape" in str(fault({**good, "a": good["a"].T}, zeros()))
    assert "float64" in str(fault({**good, "a": good["a"].astype(np.float64)}, zeros()))
    for value in (np.nan, np.inf):
        assert "NaN or infinite" in str(fault({**good, "b": np.array(value, np.float32)}, zeros()))


def test_a_variance_below_nothing_is_none_and_rounding_is_no_fault() -> None:
    weights = {"n.running_var": np.array([0.001, 2.0], np.float32), "w": np.zeros(2, np.float32)}

    def found(*moved: float) -> str | None:
        return unreal({"n.running_var": np.array(moved, np.float32), "w": np.full(2, -9, np.float32)}, weights)

    assert "isn't negative" in str(found(-1e6, 0.0)) and "isn't negative" in str(found(0.0, -2.5))
    assert found(0.5, -2.0) is None and found(-0.001, 5.0) is None and found(-0.002, -1.9) is None


def test_a_hundredfold_update_is_too_long_even_of_two() -> None:
    one = updates(1)[0]
    lengths = [norm(one), 100 * norm(one)]
    usual = usual_norm(lengths)
    assert too_long(lengths[0], usual, outlier=20, most=None) is None
    assert "100 times the usual" in str(too_long(lengths[1], usual, outlier=20, most=None))
    assert "max_norm" in str(too_long(2.0, None, outlier=20, most=1.0))
    assert usual_norm([0.0, 0.0]) is None
