"""Epsilon against another accountant, and noise for a target."""

from __future__ import annotations

import pytest

from benchmarks.budget import GRID, compare
from medray.config.privacy import PrivacyConfig
from medray.errors import PrivacyError
from medray.privacy import accountant
from medray.privacy.accountant import epsilon, merged, noise_multiplier, plan_privacy


def test_it_agrees_with_dp_accounting_and_is_never_below() -> None:
    for ratio in compare(GRID[:4]):
        assert -1e-4 <= ratio <= 0.01


def test_order_and_splitting_of_steps_cost_nothing() -> None:
    history = [(1.0, 0.1, 10), (2.0, 0.1, 5), (1.0, 0.1, 30), (3.0, 0.5, 0)]
    assert merged(history) == [(1.0, 0.1, 40), (2.0, 0.1, 5)]
    assert epsilon(history, 1e-5) == epsilon([(2.0, 0.1, 5), (1.0, 0.1, 40)], 1e-5)
    assert epsilon([], 1e-5).epsilon == 0


def test_where_prv_fails_rdp_is_taken_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [(2.0, 0.1, 20)]
    exact, loose = epsilon(history, 1e-5), epsilon(history, 1e-5, accountant="rdp")
    assert (exact.accountant, loose.accountant) == ("prv", "rdp") and exact.epsilon < loose.epsilon

    def breaks(*_args: object, **_named: object) -> float:
        raise RuntimeError("Discrete mean differs significantly from continuous mean")

    monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", breaks)
    assert epsilon(history, 1e-5) == loose
    monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", lambda *_a, **_k: float("nan"))
    assert epsilon(history, 1e-5) == loose


@pytest.mark.parametrize("bad", [(0.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1), (float("nan"), 0.1, 1)])
def test_what_is_no_mechanism_is_refused(bad: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError, match="must be finite"):
        epsilon([bad], 1e-5)


@pytest.mark.parametrize("by", ["prv", "rdp"])
def test_noise_holds_the_target_tightly_over_all_that_is_spent(by: accountant.Accountant) -> None:
    spent = [(5.0, 1.0, 1)]
    sigma = noise_multiplier(2.0, 1e-5, rate=0.1, steps=50, spent=spent, accountant=by)
    found = epsilon([*spent, (sigma, 0.1, 50)], 1e-5, accountant=by).epsilon
    assert 0.99 * 2.0 <= found <= 2.0
    with pytest.raises(PrivacyError, match="leaves nothing for training"):
        noise_multiplier(0.5, 1e-5, rate=0.1, steps=50, spent=spent)


def test_a_plan_knows_its_rate_and_what_part_of_it_costs() -> None:
    config = PrivacyConfig(epsilon=2.0, accountant="rdp")
    plan = plan_privacy(config, units=64, batch_size=48, steps=10, released=[(8.0, 1.0, 1)])
    assert plan.sample_rate == 0.75 and plan.expected_batch == 48  # and not one over the number of batches
    assert plan.epsilon <= 2.0 and plan.spent(10).epsilon == plan.epsilon
    assert 0 < plan.spent(0).epsilon < plan.spent(5).epsilon < plan.epsilon
    with pytest.raises(PrivacyError, match="exceeds the 10 patients"):
        plan_privacy(config, units=10, batch_size=48, steps=10)
    with pytest.raises(PrivacyError, match="must be below one over"):
        plan_privacy(config.model_copy(update={"delta": 0.05}), units=64, batch_size=48, steps=10)
    with pytest.raises(PrivacyError, match=r"above privacy\.epsilon"):
        plan_privacy(config.model_copy(update={"noise_multiplier": 0.5}), units=64, batch_size=48, steps=10)


def test_the_section_refuses_what_makes_no_sense() -> None:
    for wrong in ({"metric_noise": 0}, {"noise_multiplier": 1.0}, {"ledger": "l"}, {"epsilon": float("inf")}):
        with pytest.raises(ValueError):
            PrivacyConfig(**wrong)
