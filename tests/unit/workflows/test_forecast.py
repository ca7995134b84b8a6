"""What a study keeps free for its end, and for measuring, follows from what was timed of the very networks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medray.config.schema import StudyConfig
from medray.errors import BundleError
from medray.learn.corrupt import CORRUPTIONS
from medray.search.space import Space
from medray.workflows import forecast, probe, selecting
from medray.workflows.contest import robustness_extent, robustness_seconds
from medray.workflows.costs import Costs, changes_costs, untrained
from medray.workflows.forecast import EXPORT, MILLION, REPORT, Forecast
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.selecting import ONE_LOOK, SHARE, Quiet, make_chooser
from tests.unit.workflows.test_selecting import costs, trial

OBJECTIVE = ("val/auc", "max")
HEAVY = {"model.feature_size": 8}
SPACE = Space.parse({"optim.lr": {"float": [1e-4, 1e-2]}, "model.feature_size": {"choice": [4, 6, 8]}})
BUDGET = 1200.0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("forecast")
    prepare_directory("phantom://xray-nodules?cases=14&size=32", folder)
    explicit = {"model": {"name": "small_cnn", "feature_size": 4}, "device": "cpu"}
    return Recipe(directory=str(folder), explicit=explicit, cache=str(folder / "cache"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the networks of which a case was timed: a case takes a hundredth of that in seconds."""
    found: list[int] = []

    def time_case(_recipe: Recipe, experiment: Any, indices: tuple[int, ...], metric: str) -> float:
        assert indices and metric == "auc"
        found.append(experiment.model.feature_size)
        return experiment.model.feature_size / 100

    monkeypatch.setattr(forecast, "time_case", time_case)
    return found


def make(recipe: Recipe, said: list[str] | None = None, **study: Any) -> Forecast:
    config = StudyConfig.model_validate({"budget": BUDGET, "trials": 30} | study)
    chooser = make_chooser(config, config.objectives or {"val/auc": "max"}, OBJECTIVE, ("val/auc",))
    quiet = Quiet(recipe=recipe, budget=config.budget, tell=([] if said is None else said).append)
    return Forecast(recipe=recipe, study=config, chooser=chooser, quiet=quiet, metric="auc")


LIMITED: dict[str, Any] = {"select": {"limits": {"latency_ms": 50.0}}}


def parameters(recipe: Recipe, params: dict[str, Any]) -> int:
    return sum(p.numel() for p in untrained(recipe, recipe.experiment(params)).lead.model.parameters())


def test_the_end_is_kept_free_for_the_networks_that_will_be_judged(recipe: Recipe, timed: list[int]) -> None:
    found = make(recipe)
    light, heavy = found.finish([{}, {}]), found.finish([{}, HEAVY])
    splits = recipe.splits(recipe.experiment())
    cases = len(splits.val) + len(splits.test)
    robustness = [robustness_seconds(BUDGET, "classification", seconds) for seconds in (0.08, 0.12)]
    more = MILLION * (parameters(recipe, HEAVY) - parameters(recipe, {})) / 1e6
    assert heavy - light == pytest.approx(1.15 * 0.04 * cases + robustness[1] - robustness[0] + more)
    assert light > REPORT + 2 * EXPORT + 1.15 * 0.08 * cases + robustness[0]
    assert timed == [4, 8], "each network once"


def test_the_robustness_of_a_slow_network_takes_its_fewest_cases() -> None:
    levels, cases = robustness_extent(1200.0, "segmentation", 20.0)
    assert (levels, cases) == ((2,), 4)
    assert robustness_seconds(1200.0, "segmentation", 20.0) == 4 * 20.0 * (1 + len(CORRUPTIONS))
    assert robustness_seconds(1200.0, "segmentation", 0.01) == 60.0
    levels, cases = robustness_extent(1200.0, "classification", 0.001)
    assert (levels, cases) == ((1, 2, 3), 200)


def test_measuring_shortens_trials_or_makes_them_fewer(recipe: Recipe, timed: list[int]) -> None:
    clock: Any = SimpleNamespace(spent=30.0, stages={"data and plan": 20.0})

    def plan(space: Space, **study: Any) -> Any:
        return make(recipe, pruner="none", **study).budget(clock, space, [], None, concurrency=1, telling=0.0)

    rates = Space.parse({"optim.lr": {"float": [1e-4, 1e-2]}})
    wide = Space.parse({"model.dropout": {"float": [0.0, 0.5]}, "optim.lr": {"float": [1e-4, 1e-2]}})
    bare, none, few, many = plan(wide), plan(rates, **LIMITED), plan(SPACE, **LIMITED), plan(wide, **LIMITED)
    assert none.finish == bare.finish + 2 * ONE_LOOK and none.finish == many.finish
    trained = [found.trial * found.trials for found in (none, few, many)]
    assert trained[0] > trained[1] > trained[2]
    assert trained[2] + ONE_LOOK * many.trials <= many.search + 1e-6
    assert none.search == pytest.approx(bare.search - StudyConfig().search_share * 2 * ONE_LOOK)
    assert timed


def test_what_trials_took_replaces_what_was_expected(recipe: Recipe) -> None:
    found = make(recipe, **LIMITED)
    assert found.before_trial(SPACE, []) == ONE_LOOK
    found.quiet.rehearsed = costs(10.0, processes=2)  # 9 s, of which 2 in each process
    records = [trial(0, 0.5, 10.0, params={"model.feature_size": 4}, measuring=0.01)]
    assert found.before_trial(SPACE, records) == 7.0, "the default was measured before"
    records.append(trial(1, 0.5, 10.0, params={"model.feature_size": 8}, measuring=16.0))
    assert found.before_trial(SPACE, records) == 16.0
    records.append(trial(2, 0.5, 10.0, params={"model.feature_size": 6}, measuring=14.0))
    assert found.before_trial(SPACE, records) == 0.0, "there is no other network"
    wide = Space.parse({"model.dropout": {"float": [0.0, 0.5]}})
    assert found.before_trial(wide, records) == 15.0
    assert make(recipe).before_trial(wide, records) == 0.0, "nobody asked"


@pytest.mark.parametrize(
    ("path", "changes"),
    [("model.name", True), ("model.feature_size", True), ("train.patch_size", True), ("preprocess.size", True),
     ("model.pretrained", False), ("optim.lr", False), ("train.batch_size", False), ("augment.strength", False)],
)  # fmt: skip
def test_which_fields_make_another_network(path: str, changes: bool) -> None:
    assert changes_costs(path) == changes


def test_the_default_is_looked_at_once_before_the_search(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def costs_of(_recipe: Recipe, candidate: Any, _folder: Path, **how: Any) -> Costs:
        asked.append(how)
        if len(asked) > 1:
            raise BundleError("it died")
        return costs(10.0, seconds=30.0, processes=2, process_seconds=8.0)

    monkeypatch.setattr(selecting, "costs_of", costs_of)
    said: list[str] = []
    quiet = make(recipe, said).quiet
    quiet.rehearse()
    assert asked == [{"quiet": True, "trained": False}]
    assert (quiet.expected, quiet.first_look, quiet.spent) == (30.0, 22.0, 0.0)
    other = make(recipe, said).quiet
    other.rehearse()
    assert said == ["the default could not be measured: it died"]
    assert (other.expected, other.first_look) == (ONE_LOOK, ONE_LOOK)


def test_looks_end_with_the_time_that_the_study_can_spare(recipe: Recipe) -> None:
    quiet = make(recipe).quiet
    assert quiet.has_time
    quiet.spare = lambda: ONE_LOOK - 1.0
    assert not quiet.has_time


def test_a_rule_that_weighs_costs_looks_at_more_within_its_share(recipe: Recipe, timed: list[int]) -> None:
    objectives: dict[str, Any] = {"objectives": {"val/auc": "max", "latency_ms": "min"}}

    def looking(**study: Any) -> float:
        return make(recipe, **objectives, **study).finish([{}, HEAVY]) - make(recipe, **study).finish([{}, HEAVY])

    assert looking() == pytest.approx(6 * ONE_LOOK)
    assert looking(ensemble=False) == pytest.approx(3 * ONE_LOOK)
    assert looking(budget=300.0) == pytest.approx(SHARE * 300.0 + ONE_LOOK)
    assert timed


def test_one_case_of_a_slow_network_is_timed_well_enough(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    now, scored = [0.0], []

    def score(_recipe: Recipe, candidates: Any, indices: list[int], **_: Any) -> None:
        scored.append(indices)
        now[0] += candidates[0].lead.experiment.model.feature_size / 4

    monkeypatch.setattr(probe.choosing, "score", score)
    monkeypatch.setattr(probe, "time", SimpleNamespace(monotonic=lambda: now[0]))
    indices = recipe.splits(recipe.experiment()).train
    assert probe.time_case(recipe, recipe.experiment({"model.feature_size": 4}), indices, "auc") == 1.0
    assert len(scored) == 3
    assert probe.time_case(recipe, recipe.experiment({"model.feature_size": 32}), indices, "auc") == 8.0
    assert len(scored) == 4


def test_combinations_of_a_space() -> None:
    space = Space.parse(
        {"a": {"choice": ["x", "y", "z"]}, "n": {"int": [2, 8], "step": 3}, "f": {"float": [0.0, 1.0], "step": 0.25},
         "g": {"float": [0.0, 1.0]}}
    )  # fmt: skip
    assert space.variants(["a", "n"]) == 9 and space.variants(["f"]) == 5
    assert space.variants([]) == 1 and space.variants(["g", "a"]) == math.inf
