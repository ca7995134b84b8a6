"""Limits and rules as a user writes them; expressions that are read and never run."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from medray.config.compose import compose
from medray.config.expression import Formula
from medray.config.schema import StudyConfig
from medray.config.selection import SelectConfig
from medray.errors import ConfigError

FIGURES = {"accuracy": 0.9, "latency_ms": 10.0, "size_mb": 0.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.7 * accuracy + 0.3 / latency_ms", 0.66),
        ("-latency_ms", -10.0),
        ("(accuracy - 0.5) ** 2", 0.16),
        ("log(latency_ms) - log(10)", 0.0),
        ("max(0, 1 - latency_ms / 20) + min(accuracy, 1, 2)", 1.4),
        ("accuracy / size_mb", math.nan),
        ("log(size_mb)", math.nan),
        ("latency_ms ** 999 ** 9", math.nan),
        ("(-accuracy) ** 0.5", math.nan),
        ("accuracy + memory_mb", math.nan),
    ],
)
def test_an_expression_is_arithmetic_over_figures(text: str, value: float) -> None:
    assert Formula.parse(text).value(FIGURES) == pytest.approx(value, nan_ok=True)


def test_an_expression_names_what_it_needs() -> None:
    assert Formula.parse("accuracy / latency_ms + accuracy").names == ("accuracy", "latency_ms")


@pytest.mark.parametrize(
    "text",
    [
        "", "accuracy +", "1 + 2", "'a' * accuracy", "accuracy.real", "accuracy[0]", "__import__('os').system('x')",
        "open(accuracy)", "lambda: accuracy", "[accuracy]", "accuracy if True else 0", "accuracy < 1", "True * size_mb",
        "accuracy % 2", "accuracy // 2", "log(accuracy, base=2)", "min(accuracy)", "log", "accuracy and 1",
        "(a := accuracy)", "f'{accuracy}'", "1j * accuracy", "accuracy;accuracy", "*accuracy",
        "+".join(["accuracy"] * 200), "accuracy " * 60,
        "(" * 250 + "accuracy" + ")" * 250,
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Formula.parse(text)


def test_limits_and_rule_are_set_on_the_command_line() -> None:
    study = compose(
        None,
        [
            "study.select.limits.latency_ms=50",
            "study.select.limits.parameters=1000000",
            "study.select.rule=weighted",
            "study.select.expression=0.7 * accuracy + 0.3 / latency_ms",
        ],
    ).study
    assert study.select.limits.given == {"latency_ms": 50.0, "parameters": 1e6}
    assert study.select.formula is not None and study.select.formula.names == ("accuracy", "latency_ms")
    assert StudyConfig.model_validate(study.model_dump(mode="json")) == study


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["study.select.limits.latency=50"], r"latency_ms"),
        (["study.select.limits.latency_ms=0"], r"greater than 0|> 0"),
        (["study.select.rule=weighted"], "needs an expression"),
        (["study.select.rule=weighted", "study.select.expression=accuracy +"], "no expression"),
        (["study.select.rule=best", "study.select.expression=accuracy"], "no use for one"),
        (["study.select.rule=scorecard"], "set one at least"),
        (["study.select.on_fail=ignore"], "refuse"),
    ],
)
def test_what_makes_no_sense_is_said(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(None, overrides)


def test_a_scorecard_ranks_what_breaks_a_limit_and_the_others_refuse_it() -> None:
    assert SelectConfig().refuses
    assert not SelectConfig.model_validate({"rule": "scorecard", "limits": {"size_mb": 1}}).refuses
    assert SelectConfig.model_validate({"rule": "scorecard", "limits": {"size_mb": 1}, "on_fail": "refuse"}).refuses
    assert not SelectConfig(on_fail="last").refuses
    with pytest.raises(ValidationError):
        SelectConfig.model_validate({"limits": {"latency_ms": math.inf}})
