"""How a trial becomes an Experiment, and the clock that counts over all sittings of a study."""

from __future__ import annotations

import json
import pickle
import time

import pytest

from medray.data.splits import make_splits
from medray.errors import ConfigError, MedrayError, ModelError
from medray.plan.machine import GIB, Machine
from medray.workflows.clock import Clock
from medray.workflows.planning import describe, dump, prepare_directory
from medray.workflows.recipe import FIXED, Recipe, nest

LAPTOP = Machine(cpus=2, memory=8 * GIB)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    prepare_directory("phantom://ct-lesions?cases=8&size=16", folder)
    return folder


@pytest.fixture
def recipe(prepared):
    def make(**explicit):
        return Recipe(directory=str(prepared), explicit=explicit, cache=str(prepared / "cache"), machine=LAPTOP)

    return make


# Layers --------------------------------------------------------------------------------------------------------------


def test_the_plan_lies_under_what_the_user_set_under_the_trial(recipe):
    planned = recipe().experiment()
    asked = recipe(optim={"lr": 0.5, "weight_decay": 0.25}).experiment()
    tried = recipe(optim={"lr": 0.5, "weight_decay": 0.25}).experiment({"optim.lr": 0.125})
    assert planned.preprocess.normalize == "ct" and planned.optim.lr not in (0.5, 0.125)
    assert (asked.optim.lr, asked.optim.weight_decay, asked.preprocess) == (0.5, 0.25, planned.preprocess)
    assert (tried.optim.lr, tried.optim.weight_decay) == (0.125, 0.25)


def test_another_network_is_planned_anew(recipe):
    """Depth and width are the U-Net's; SegResNet refuses what it doesn't have."""
    own = recipe()
    unet, other = own.experiment(), own.experiment({"model.name": "segresnet"})
    assert other.model.name == "segresnet" and other.optim.lr != unet.optim.lr
    by_user = recipe(model={"name": "segresnet"})
    assert by_user.experiment() == other
    assert by_user.experiment({"model.name": "unet"}) == unet


@pytest.mark.parametrize("path", ["data", "seed", "task.kind", "split.fold", "split.seed"])
def test_what_decides_the_cases_or_the_luck_may_not_vary(recipe, path):
    assert path.split(".")[0] in FIXED
    with pytest.raises(ConfigError, match=rf"space\.{path.split('.')[0]}: may not vary"):
        recipe().experiment({path: 1})


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"optim.rl": 1e-3}, "lr"),
        ({"optim.lr": -1.0}, "optim.lr"),
        ({"model.name": "unett"}, "unet"),
        ({"model.name": "resnet18"}, "segmentation"),
        ({"train.patch_size": [15, 16, 16]}, "multiple"),
        ({"optim.lr.value": 1.0}, "optim.lr"),
    ],
)
def test_a_wrong_trial_is_refused_by_name(recipe, params, error):
    with pytest.raises(MedrayError, match=error):
        recipe().experiment(params)


def test_a_network_for_other_axes_is_refused(recipe):
    from medray.models.catalogue import CATALOGUE

    flat = next(s.name for s in CATALOGUE.values() if s.ndims == (2,) and "segmentation" in s.kinds)
    with pytest.raises(ModelError, match="3-D"):
        recipe().experiment({"model.name": flat})


def test_nest():
    assert nest({"optim.lr": 1, "optim.name": "sgd", "seed": 2}) == {"optim": {"lr": 1, "name": "sgd"}, "seed": 2}


# Seeds, time, cases --------------------------------------------------------------------------------------------------


def test_twins_differ_in_the_seed_alone_and_share_their_cases(recipe):
    own = recipe(seed=2**31 - 1)
    first, second = own.experiment(), own.experiment(twin=1)
    seeds = {own.experiment(twin=n).seed for n in range(6)}
    assert len(seeds) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert second == first.model_copy(update={"seed": second.seed})
    assert own.splits(first) == own.splits(second)


def test_the_split_follows_its_own_seed(recipe):
    own = recipe(split={"seed": 5})
    experiment = own.experiment()
    assert own.splits(experiment) == make_splits(own.manifest, experiment.split, 5)


@pytest.mark.parametrize(
    ("train", "budget", "epochs"),
    [
        ({}, 60.0, 1000),  # the study's seconds, and the plan's epochs as a limit
        ({"epochs": 3}, None, 3),  # the user counts in epochs
        ({"budget": 5.0}, 5.0, 1000),
        ({"epochs": 3, "budget": 5.0}, 5.0, 3),
    ],
)
def test_the_users_own_epochs_and_budget_win(recipe, train, budget, epochs):
    own = recipe(**({"train": train} if train else {}))
    found = own.experiment(budget=60.0).train
    assert (found.budget, found.epochs) == (budget, epochs)


def test_a_recipe_travels_to_a_worker_without_its_data(recipe):
    own = recipe(optim={"lr": 0.5})
    size = len(pickle.dumps(own))
    assert size < 2000
    assert pickle.loads(pickle.dumps(own)).experiment() == own.experiment()


def test_the_written_plan_reads_back_to_the_same_experiment(recipe, tmp_path):
    from medray.config.compose import build_experiment, compose

    own = recipe()
    experiment = own.experiment(budget=12.5)
    path = tmp_path / "experiment.yaml"
    path.write_text(describe(experiment, own.fingerprint, own.machine), encoding="utf-8")
    assert build_experiment(compose(path, []).explicit) == experiment
    head = path.read_text(encoding="utf-8").split(dump(experiment))[0]
    assert "background, liver, lesion" in head and all(line.startswith("#") for line in head.splitlines())


# The clock -----------------------------------------------------------------------------------------------------------


def test_the_clock_counts_over_all_sittings(tmp_path):
    path = tmp_path / "clock.json"
    first = Clock(path, 100.0)
    with first.stage("search"):
        time.sleep(0.05)
    second = Clock(path, 100.0)
    assert second.spent >= first.stages["search"] >= 0.05
    assert second.left == pytest.approx(100.0 - second.spent, abs=0.05)
    with second.stage("search"):
        pass
    assert second.stages["search"] >= first.stages["search"]


def test_the_start_may_lie_before_the_clock(tmp_path):
    assert 30.0 <= Clock(tmp_path / "clock.json", 10.0, started=time.time() - 30).spent < 35.0
    assert Clock(tmp_path / "clock.json", 10.0, started=time.time() + 30).spent < 5.0  # another machine's clock


def test_a_stage_that_fails_is_booked_too(tmp_path):
    clock = Clock(tmp_path / "clock.json", 10.0)
    with pytest.raises(KeyboardInterrupt), clock.stage("search"):
        raise KeyboardInterrupt
    assert "search" in json.loads(clock.path.read_text(encoding="utf-8"))["stages"]


def test_a_stage_that_runs_is_booked_as_far_as_it_has_come(tmp_path):
    clock = Clock(tmp_path / "clock.json", 10.0)
    clock.stages["report"] = 5.0
    with clock.stage("report"):
        assert 5.0 <= clock.booked["report"] < 6.0 and clock.stages["report"] == 5.0
    assert clock.booked == clock.stages


def test_saving_often_is_cheap_and_leaves_no_parts(tmp_path):
    clock = Clock(tmp_path / "clock.json", 10.0)
    clock.save()
    clock.path.unlink()
    clock.save(every=60.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "12", '"x"', "{}", '{"spent": "x", "stages": {}}', '{"spent": null, "stages": {}}',
     '{"spent": 5, "stages": []}', '{"spent": 5, "stages": null}', '{"spent": 5, "stages": {"a": "b"}}',
     '{"spent": -5, "stages": {}}', '{"spent": NaN, "stages": {}}', '{"spent": Infinity, "stages": {}}', "\xff\x00"],
)  # fmt: skip
def test_a_damaged_file_starts_from_nothing(tmp_path, text):
    path = tmp_path / "clock.json"
    path.write_bytes(text.encode("latin-1"))
    clock = Clock(path, 10.0)
    assert 0.0 <= clock.spent < 1.0 and clock.stages == {}
    clock.save()
    assert json.loads(path.read_text(encoding="utf-8"))["spent"] >= 0.0
