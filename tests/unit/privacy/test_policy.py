from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest

from medray.config.federation_files import SiteConfig
from medray.config.schema import Experiment
from medray.errors import PolicyError, WithheldError
from medray.privacy.policy import Request, decide, decide_fingerprint, decide_survey, recipe_digest, within

NOON = dt.datetime(2026, 11, 28, 12, 0)
REQUEST = Request(
    recipe="a" * 64, model="unet", strategy="fedavg", rounds=10, local_epochs=1, epsilon=2.0, delta=1e-5, noise=1.0
)


def rules(**changes: Any) -> SiteConfig:
    tree: dict[str, Any] = {"federation": "hearts", "name": "a", "server": "localhost:9443", "data": "images"}
    return SiteConfig.model_validate(tree | changes)


def ask(site: SiteConfig, request: Request = REQUEST, *, spent: float = 0.0, patients: int = 100) -> None:
    decide(site, request, now=NOON, spent=spent, patients=patients)


def passes(site: SiteConfig, request: Request = REQUEST, **more: Any) -> bool:
    try:
        ask(site, request, **more)
    except PolicyError:
        return False
    return True


def test_what_keeps_the_rules_passes() -> None:
    assert passes(rules())
    assert passes(rules(privacy={"required": False}), replace(REQUEST, epsilon=None, delta=None, noise=None))
    assert passes(
        rules(allow={"recipes": ["a" * 64], "models": ["unet"], "strategies": ["fedavg"], "hours": "08:00-18:00"})
    )
    assert passes(rules(), spent=6.0)
    assert passes(rules(privacy={"least_sites": 5}), replace(REQUEST, secure_aggregation=True, quorum=5))


@pytest.mark.parametrize(
    ("site", "request_", "more", "reason"),
    [
        ({"allow": {"recipes": ["b" * 64]}}, {}, {}, "none of allow.recipes"),
        ({"allow": {"models": ["resnet18"]}}, {}, {}, "model 'unet'"),
        ({"allow": {"strategies": ["krum"]}}, {}, {}, "strategy 'fedavg'"),
        (
            {"privacy": {"least_sites": 5}},
            {"secure_aggregation": True, "quorum": 4},
            {},
            "over 4 sites (federation.quorum), fewer than privacy.least_sites=5",
        ),
        ({"allow": {"rounds": 5}}, {}, {}, "10 rounds"),
        ({"allow": {"local_epochs": 1}}, {"local_epochs": 2}, {}, "2 passes over the data in a round are more"),
        ({"allow": {"local_steps": 9}}, {"local_epochs": None, "local_steps": 10}, {}, "allow.local_steps=9"),
        ({}, {"epsilon": None}, {}, "no differential privacy"),
        ({}, {"epsilon": 3.5}, {}, "privacy.epsilon_per_run=3"),
        ({}, {}, {"spent": 6.01}, "on top of what was spent this year is more than privacy.epsilon_per_year=8"),
        ({}, {"delta": 1e-3}, {}, "privacy.delta"),
        ({}, {"noise": 0.1}, {}, "privacy.least_noise"),
        ({"privacy": {"unit": ["patient"]}}, {}, {}, "privacy.unit (patient)"),
        ({}, {}, {"patients": 19}, "fewest=20"),
        ({"allow": {"hours": "19:00-06:00"}}, {}, {}, "it is 12:00 here"),
    ],
)
def test_what_breaks_one_is_refused_and_says_which(
    site: dict[str, Any], request_: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PolicyError) as refused:
        ask(rules(**site), replace(REQUEST, **request_), **more)
    assert reason in str(refused.value)
    assert str(refused.value).count(";") == 0, "one rule was broken, and one reason is given"


def test_what_was_spent_is_told_to_the_sites_own_log_alone() -> None:
    for asks in (ask, lambda site, spent: decide_survey(site, REQUEST, now=NOON, spent=spent, patients=100)):
        with pytest.raises(WithheldError) as refused:
            asks(rules(), spent=6.017)
        assert "6.02" in refused.value.exactly and "6.0" not in str(refused.value)


@pytest.mark.parametrize(
    ("privacy", "leaves"),
    [
        ({}, False),
        ({"required": False}, True),
        ({"required": False, "require_secure_aggregation": True}, False),
        ({"require_secure_aggregation": True, "share_fingerprint": True}, True),
    ],
)
def test_whose_exact_fingerprint_leaves(privacy: dict[str, Any], leaves: bool) -> None:
    site = rules(privacy=privacy)
    if leaves:
        decide_fingerprint(site, now=NOON, patients=100)
        return
    with pytest.raises(PolicyError, match=r"share_fingerprint false.*secure_aggregation"):
        decide_fingerprint(site, now=NOON, patients=100)


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(PolicyError) as refused:
        ask(rules(allow={"rounds": 5, "models": ["resnet18"]}), spent=7.0, patients=3)
    assert str(refused.value).count(";") == 3


@pytest.mark.parametrize(
    ("hours", "time", "inside"),
    [
        ("08:00-18:00", "08:00", True),
        ("08:00-18:00", "18:00", False),
        ("19:00-06:00", "23:59", True),
        ("19:00-06:00", "00:00", True),
        ("19:00-06:00", "06:00", False),
        ("19:00-06:00", "12:00", False),
    ],
)
def test_hours_may_pass_midnight(hours: str, time: str, inside: bool) -> None:
    assert within(hours, dt.time.fromisoformat(time)) is inside


def test_a_recipe_is_known_by_its_content() -> None:
    recipe = Experiment()
    assert recipe_digest(recipe) == recipe_digest(recipe.model_copy(update={"data": "elsewhere", "device": "cpu"}))
    other = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 0.5})})
    assert recipe_digest(recipe) != recipe_digest(other)
