"""Noise at the server: as much as the accountant asks for, and a clipping norm that moves the right way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from medray.config.federation import CentralPrivacyConfig
from medray.config.schema import Experiment
from medray.errors import PrivacyError
from medray.privacy.accountant import epsilon
from medray.privacy.central import Central, clipped, plan_central


def config(**changes: Any) -> CentralPrivacyConfig:
    return CentralPrivacyConfig.model_validate({"epsilon": 5.0, "delta": 1e-3, **changes})


def test_all_rounds_together_stay_within_epsilon_and_nearly_use_it_up() -> None:
    plan = plan_central(config(), rounds=20)
    assert plan.counts is not None
    both = 1 / math.sqrt(plan.updates**-2 + (2 * plan.counts) ** -2)
    assert both == pytest.approx(plan.noise_multiplier, rel=1e-12), "updates and counts together cost one Gaussian"
    # As two releases a round, which is how it is done, it costs no more.
    history = [(plan.updates, 1.0, 20), (2 * plan.counts, 1.0, 20)]
    spent = epsilon(history, 1e-3, accountant="rdp").epsilon
    assert spent == pytest.approx(epsilon([(both, 1.0, 20)], 1e-3, accountant="rdp").epsilon, rel=1e-9)
    assert 4.9 < plan.epsilon <= 5.0 < spent < 6.0, "the tighter accountant finds the tighter noise"
    still = plan_central(config(adaptive=False), rounds=20)
    assert still.counts is None and still.updates == still.noise_multiplier == plan.noise_multiplier
    # The Gaussian mechanism's own formula (Balle and Wang 2018): all rounds are one of sqrt(20) times the sensitivity.
    mu = math.sqrt(20) / plan.noise_multiplier
    normal = lambda x: 0.5 * math.erfc(-x / math.sqrt(2))  # noqa: E731
    delta = normal(mu / 2 - 5.0 / mu) - math.exp(5.0) * normal(-mu / 2 - 5.0 / mu)
    assert 0.9e-3 < delta <= 1e-3


def test_the_noise_is_what_the_plan_says() -> None:
    made = Central(config(clip_norm=2.0, adaptive=False), 3)
    mean = made.mean([np.zeros(40_000), np.zeros(40_000)])
    wanted = made.plan.updates * 2.0 / 2
    assert mean.std() == pytest.approx(wanted, rel=0.03) and abs(mean.mean()) < 5 * wanted / 200
    assert made.clip == 2.0
    again = Central(config(clip_norm=2.0, adaptive=False), 3).mean([np.zeros(40_000), np.zeros(40_000)])
    assert not np.array_equal(mean, again)


@pytest.mark.parametrize(("start", "quantile"), [(0.01, 0.5), (1000.0, 0.5), (1.0, 0.9)])
def test_the_clipping_norm_finds_its_quantile_from_either_side(
    monkeypatch: pytest.MonkeyPatch, start: float, quantile: float
) -> None:
    """Norms from 1 to 10: the median lies at 5.5, nine tenths below 9.5. Flower's moves away from it."""
    made = Central(config(clip_norm=start, quantile=quantile, rate=0.3), 400)
    monkeypatch.setattr(made._random, "normal", lambda count: np.zeros(count))
    updates = [np.full(4, norm / 2) for norm in range(1, 11)]
    norms = []
    for _ in range(400):
        made.mean(updates)
        norms.append(made.clip)
    low, high = (5, 6) if quantile == 0.5 else (9, 10)
    assert all(0.9 * low < norm < 1.1 * high for norm in norms[200:])
    with pytest.raises(PrivacyError, match="beyond the 400"):
        made.mean(updates)


def test_one_site_moves_the_sum_by_the_norm_at_most() -> None:
    for norm in (0.5, 3.0):
        row, inside = clipped(np.full(4, 1.0), norm)
        assert np.linalg.norm(row) == pytest.approx(min(norm, 2.0)) and inside == (norm >= 2.0)
    made = Central(config(), 5)
    made.clip, made.released = 7.0, 3
    other = Central(config(), 5)
    other.load_state(made.state())
    assert (other.clip, other.released) == (7.0, 3)


def test_a_sum_of_sites_that_did_not_clip_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under masks the server sees the sum alone: a site that hands in a thousand times the norm moves no more."""
    lying, honest = (Central(config(clip_norm=2.0), 3) for _ in range(2))
    for made in (lying, honest):
        monkeypatch.setattr(made._random, "normal", lambda count: np.full(count, 0.0 if count > 1 else -1.0))
    row = np.full(16, 1000.0)
    assert np.linalg.norm(lying.mean_of(row, 1e6, 4)) == pytest.approx(2.0)
    honest.mean_of(row * 0, 2.0, 4)
    assert lying.clip == honest.clip, "nor does it pretend to be more than all sites"


def test_settings_that_protect_nothing_are_refused() -> None:
    for field in ({"delta": 1e-3}, {"clip_norm": 2.0}, {"adaptive": False}, {"quantile": 0.4}, {"rate": 0.3}):
        with pytest.raises(ValidationError, match=rf"federation\.privacy\.{next(iter(field))} needs"):
            Experiment.model_validate({"federation": {"privacy": field}})
    document = Experiment().model_dump(mode="json")
    assert Experiment.model_validate(document) == Experiment()
    for local in ({"strategy": "fedbn"}, {"local": ["head.*"]}):
        with pytest.raises(ValidationError, match="would stay at the site without noise"):
            Experiment.model_validate({"federation": {"privacy": {"epsilon": 5.0}, **local}})


def test_what_no_noise_would_hide_is_refused() -> None:
    with pytest.raises(PrivacyError, match="nothing to plan"):
        plan_central(CentralPrivacyConfig(), 3)
    with pytest.raises(ValidationError, match="moved far by a single site"):
        Experiment.model_validate({"federation": {"strategy": "median", "privacy": {"epsilon": 1.0}}})
    with pytest.raises(ValidationError, match="Choose one"):
        Experiment.model_validate({"federation": {"privacy": {"epsilon": 1.0}}, "privacy": {"epsilon": 1.0}})
