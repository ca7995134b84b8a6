from __future__ import annotations

from typing import Any

import optuna
import pytest

from medray.errors import ConfigError
from medray.search.space import Space

SPACE = {
    "model.feature_size": {"choice": [12, 24], "when": {"model.name": ["swin", "unetr"]}},
    "model.window": {"int": [3, 7], "step": 2, "when": {"model.feature_size": 24}},
    "model.name": {"choice": ["unet", "swin", "unetr"]},
    "optim.lr": {"float": ["1e-4", 1e-2], "log": True},
    "train.patch_size": {"choice": [[32, 32], [64, 64]]},
}


def draw(space: Space, seed: int, count: int = 60) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_parents_come_before_what_depends_on_them() -> None:
    order = [parameter.path for parameter in Space.parse(SPACE)]
    assert order.index("model.name") < order.index("model.feature_size") < order.index("model.window")


def test_draws_lie_in_the_space_and_honour_conditions() -> None:
    space = Space.parse(SPACE)
    draws = draw(space, seed=0)
    assert all(space.contains(params) for params in draws)
    for params in draws:
        assert ("model.feature_size" in params) == (params["model.name"] != "unet")
        assert ("model.window" in params) == (params.get("model.feature_size") == 24)
        assert 1e-4 <= params["optim.lr"] <= 1e-2
    assert {params["model.window"] for params in draws if "model.window" in params} == {3, 5, 7}
    # A choice that is a list comes out as the list, not as the text that Optuna keeps.
    assert {tuple(params["train.patch_size"]) for params in draws} == {(32, 32), (64, 64)}


@pytest.mark.parametrize(
    ("params", "inside"),
    [
        ({"model.name": "unet", "optim.lr": 1e-3, "train.patch_size": [32, 32]}, True),
        ({"model.name": "unet", "optim.lr": 1e-3, "train.patch_size": (32, 32)}, True),
        ({"model.name": "unet", "optim.lr": 1e-4, "train.patch_size": [64, 64]}, True),
        ({"model.name": "unet", "optim.lr": 2e-2, "train.patch_size": [32, 32]}, False),
        ({"model.name": "segresnet", "optim.lr": 1e-3, "train.patch_size": [32, 32]}, False),
        ({"model.name": "swin", "optim.lr": 1e-3, "train.patch_size": [32, 32]}, False),
        ({"model.name": "unet", "optim.lr": 1e-3}, False),
        ({"model.name": "unet", "optim.lr": 1e-3, "train.patch_size": [32, 32], "model.feature_size": 12}, False),
        ({"model.name": "swin", "optim.lr": 1e-3, "train.patch_size": [32, 32], "model.feature_size": 12}, True),
        ({"model.name": "unet", "optim.lr": True, "train.patch_size": [32, 32]}, False),
        ({"model.name": "unet", "optim.lr": float("nan"), "train.patch_size": [32, 32]}, False),
    ],
)
def test_contains(params: dict[str, Any], inside: bool) -> None:
    assert Space.parse(SPACE).contains(params) is inside


def test_steps_end_at_the_last_value_that_is_drawn() -> None:
    (parameter,) = Space.parse({"a.b": {"float": [0.0, 1.0], "step": 0.3}})
    assert parameter.ends == (0.0, pytest.approx(0.9))
    assert parameter.contains(0.6) and not parameter.contains(0.5) and not parameter.contains(1.0)


def test_true_is_not_one() -> None:
    space = Space.parse({"a": {"choice": [True, 1, None, 0.5, "1"]}})
    assert {repr(params["a"]) for params in draw(space, seed=1)} == {"True", "1", "None", "0.5", "'1'"}
    assert not space.contains({"a": False})


def test_active_leaves_out_what_the_conditions_exclude() -> None:
    default = {"model.name": "unet", "model.feature_size": None, "optim.lr": 1e-3, "loss.name": "dice"}
    assert Space.parse(SPACE).active(default) == {"model.name": "unet", "optim.lr": 1e-3}


def test_describe_is_the_grammar() -> None:
    space = Space.parse(SPACE)
    assert Space.parse(space.describe()).describe() == space.describe()


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ({"chioce": ["a"]}, "did you mean 'choice'"),
        ({"choice": ["a"], "int": [1, 2]}, "exactly one of"),
        ([1, 2], "is no rule"),
        ({"choice": []}, "empty"),
        ({"choice": ["a", "a"]}, "stands twice"),
        ({"choice": "a"}, "is no list"),
        ({"choice": [{1, 2}]}, "can't be stored"),
        ({"choice": [float("nan")]}, "can't be stored"),
        ({"float": [1, 2, 3]}, r"needs \[low, high\]"),
        ({"float": [2, 1]}, "must be below"),
        ({"float": [1, 1]}, "single value"),
        ({"float": ["a", 1]}, "is no number"),
        ({"float": [True, 2]}, "is no number"),
        ({"float": [0, float("inf")]}, "finite"),
        ({"float": [0, 1], "log": True}, "above 0"),
        ({"float": [1, 2], "log": "yes"}, "true or false"),
        ({"float": [1, 2], "log": True, "step": 0.1}, "exclude each other"),
        ({"float": [1, 2], "step": 3}, "at most high - low"),
        ({"float": [1, 2], "setp": 0.1}, "did you mean 'step'"),
        ({"int": [1, 2.5]}, "whole number"),
        ({"choice": [1, 2], "log": True}, "unknown key 'log'"),
        ({"choice": [1, 2], "when": "x"}, "is no condition"),
        ({"choice": [1, 2], "when": {"model.nam": "unet"}}, "did you mean 'model.name'"),
        ({"choice": [1, 2], "when": {"model.name": "vnet"}}, "never is 'vnet'"),
        ({"choice": [1, 2], "when": {"model.name": []}}, "never is"),
    ],
)
def test_bad_rules_say_path_value_and_fix(rule: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        Space.parse({"model.name": {"choice": ["unet", "swin"]}, "train.x": rule})
    assert "space.train.x" in str(caught.value)


def test_conditions_in_a_circle() -> None:
    with pytest.raises(ConfigError, match="circle"):
        Space.parse({"a": {"choice": [1], "when": {"b": 1}}, "b": {"choice": [1], "when": {"a": 1}}})


def test_validate_tries_ends_and_choices_under_every_condition() -> None:
    tried: list[dict[str, Any]] = []
    Space.parse(SPACE).validate(tried.append)
    assert {"optim.lr": 1e-4} in tried and {"optim.lr": 1e-2} in tried
    for name in ("swin", "unetr"):
        for size in (12, 24):
            assert {"model.name": name, "model.feature_size": size} in tried
        assert {"model.name": name, "model.feature_size": 24, "model.window": 7} in tried
    assert not any(params.get("model.name") == "unet" and len(params) > 1 for params in tried)


def test_validate_names_the_value_that_is_refused() -> None:
    def check(params: dict[str, Any]) -> None:
        if params.get("model.feature_size") == 24 and params["model.name"] == "unetr":
            raise ValueError("must be at most 16")

    with pytest.raises(ConfigError, match=r"feature_size: the value 24 \(with model.name='unetr'\).*at most 16"):
        Space.parse(SPACE).validate(check)
