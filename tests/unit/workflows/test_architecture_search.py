"""The phase before the trials: what it refuses, what it sees, what it hands on; and a search from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from medray.config.compose import compose
from medray.config.schema import NasConfig
from medray.errors import ConfigError
from medray.plan.machine import GIB, Machine
from medray.search.nas.draw import random_genotype
from medray.search.space import Space
from medray.workflows.architecture import (
    SearchTask,
    check,
    filled,
    halve,
    run_search,
    search_experiment,
    stand_in,
    super_plan,
)
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe

DARTS = NasConfig(strategy="darts", nodes=2, feature_size=2, batch_size=4)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    found = {}
    for name, source in {
        "classification": "phantom://xray-nodules?cases=16&size=28",
        "segmentation": "phantom://fundus-vessels?cases=8&size=96",
        "volumes": "phantom://ct-lesions?cases=8&size=24",
    }.items():
        folder = tmp_path_factory.mktemp(name)
        prepare_directory(source, folder)
        machine = Machine(cpus=2, memory=8 * GIB)
        found[name] = Recipe(directory=str(folder), explicit={}, cache=str(folder / "cache"), machine=machine)
    return found


# The space -----------------------------------------------------------------------------------------------------------


def test_a_search_and_a_space_that_wants_it_need_each_other():
    wants = {"model.name": {"choice": ["searched", "unet"]}}
    check(NasConfig(), {"optim.lr": {"float": [1e-4, 1e-2]}})
    check(DARTS, wants)
    with pytest.raises(ConfigError, match=r"study\.nas\.strategy=darts"):
        check(NasConfig(), wants)
    for space in ({}, {"model.name": {"choice": ["unet"]}}, {"model.name": "searched"}):
        with pytest.raises(ConfigError, match=r"add 'searched' to space\.model\.name\.choice"):
            check(DARTS, space)
    with pytest.raises(ConfigError, match="Did you mean 'enas'"):
        check(NasConfig(strategy="ennas"), wants)


def test_what_was_found_takes_the_place_of_searched_in_conditions_too():
    space = {
        "model.name": {"choice": ["unet", "searched"]},
        "model.feature_size": {"choice": [8, 12], "when": {"model.name": "searched"}},
        "model.drop_path": {"float": [0.0, 0.3], "when": {"model.name": ["searched", "unet"]}},
        "optim.lr": {"float": [1e-4, 1e-2]},
    }
    names = [random_genotype("segmentation", 2, seed).name for seed in (1, 2)]
    full = filled(space, names)
    assert full["model.name"]["choice"] == ["unet", *names]
    assert full["model.feature_size"]["when"] == {"model.name": names}
    assert full["model.drop_path"]["when"] == {"model.name": [*names, "unet"]}
    assert full["optim.lr"] == space["optim.lr"] and space["model.name"]["choice"] == ["unet", "searched"]
    assert Space.parse(full).contains({"model.name": names[1], "model.feature_size": 8, "model.drop_path": 0.1,
                                       "optim.lr": 1e-3})  # fmt: skip


def test_a_table_has_no_architecture_to_search(recipes):
    manifest = recipes["classification"].manifest
    assert stand_in(manifest, DARTS).nodes == 2
    with pytest.raises(ConfigError, match="is a table"):
        stand_in(manifest.model_copy(update={"columns": ("age",)}), DARTS)


@pytest.mark.parametrize(
    ("file", "data"),
    [("nas_darts", "classification"), ("nas_darts", "volumes"), ("nas_enas", "segmentation"),
     ("nas_hardware", "segmentation"), ("nas_hardware", "classification")],
)  # fmt: skip
def test_the_shipped_spaces_fit_the_data_that_they_are_for(recipes, repository, file, data):
    overrides = []
    if (file, data) == ("nas_hardware", "classification"):  # as its head says
        overrides = ["model.name=elastic_mbconv", "~study.objectives.val/dice", "study.objectives.val/auc=max"]
    composed = compose(repository / "search_spaces" / f"{file}.yaml", overrides)
    recipe = replace(
        recipes[data], explicit={key: composed.explicit[key] for key in ("model",) if key in composed.explicit}
    )
    nas = composed.study.nas
    check(nas, composed.space)
    names = [stand_in(recipe.manifest, nas).name] if nas.strategy else []
    Space.parse(filled(composed.space, names)).validate(recipe.experiment)
    assert sorted(composed.study.objectives) in ([], ["latency_ms", "val/auc"], ["latency_ms", "val/dice"])


@pytest.mark.parametrize("file", ["nas_darts", "nas_enas"])
def test_a_default_without_a_width_of_its_own_is_no_obstacle(recipes, repository, file):
    """Larger images, volumes and GPUs get a ResNet as trial 0, which has no feature_size."""
    composed = compose(repository / "search_spaces" / f"{file}.yaml", [])
    recipe = replace(recipes["classification"], explicit={"model": {"name": "resnet18"}})
    names = [stand_in(recipe.manifest, composed.study.nas).name]
    space = Space.parse(filled(composed.space, names))
    space.validate(recipe.experiment)
    assert "model.feature_size" in space.active({"model.name": names[0], "model.feature_size": 8})


# What the search sees ------------------------------------------------------------------------------------------------


def test_it_sees_training_cases_in_two_halves_that_share_no_patient(recipes):
    for recipe in recipes.values():
        splits = recipe.splits(recipe.experiment())
        weights, held = halve(recipe.manifest, splits.train, 0)
        assert sorted((*weights, *held)) == sorted(splits.train) and abs(len(weights) - len(held)) <= 2
        cases = recipe.manifest.cases
        assert not {cases[i].group for i in weights} & {cases[i].group for i in held}


def test_halves_are_the_same_whatever_split_the_data_give(recipes):
    manifest = recipes["classification"].manifest
    marked = manifest.model_copy(
        update={"cases": tuple(c.model_copy(update={"split": "train"}) for c in manifest.cases)}
    )
    assert halve(manifest, range(10), 0) == halve(marked, range(10), 0)


def test_a_super_network_is_smaller_than_what_will_be_trained(recipes):
    recipe = recipes["segmentation"]
    own = recipe.experiment({"model.name": stand_in(recipe.manifest, DARTS).name})
    narrow = search_experiment(recipe, DARTS)
    assert narrow.train.batch_size == min(4, own.train.batch_size) and narrow.preprocess == own.preprocess
    assert max(narrow.train.patch_size) <= 64 < max(own.train.patch_size)
    assert super_plan(narrow, recipe.manifest, DARTS).depth == 3
    noisy = search_experiment(replace(recipe, explicit={"loss": {"name": "dice_heteroscedastic"}}), DARTS)
    assert noisy.loss.name == "dice_ce"
    plan = super_plan(search_experiment(recipes["classification"], DARTS), recipes["classification"].manifest, DARTS)
    assert (plan.depth, plan.extent) == (2, 28)


# From end to end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "strategy"), [("classification", "darts"), ("volumes", "enas")])
def test_a_search_leaves_a_genotype_that_is_a_model_and_a_picture(recipes, tmp_path, data, strategy):
    recipe, folder = recipes[data], tmp_path / "nas"
    nas = DARTS.model_copy(update={"strategy": strategy, "steps": 2, "nodes": 1})
    task = SearchTask(recipe=recipe, nas=nas, directory=str(folder), seconds=300.0)
    found = run_search(task)
    assert found.steps == 2 and all("train_loss" in row for row in found.history)
    experiment = recipe.experiment({"model.name": found.genotypes[0].name})
    assert experiment.model.name == found.genotypes[0].name
    assert json.loads((folder / "genotype.json").read_text())["kind"] in ("classification", "segmentation")
    picture = (folder / "cells.svg").read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg") and "href" not in picture
    written = (folder / "result.json").stat().st_mtime_ns
    assert run_search(task) == found and (folder / "result.json").stat().st_mtime_ns == written
