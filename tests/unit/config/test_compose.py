"""Composition: what a user may write, and what he hears when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from medray.config.compose import CONF, build_experiment, compose
from medray.config.paths import known
from medray.config.schema import Experiment
from medray.errors import ConfigError

TASKS = ("segmentation", "classification")
SPACES = sorted((Path(__file__).parents[3] / "search_spaces").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "space.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_shipped_search_spaces_compose(path: Path) -> None:
    composed = compose(path)
    task = composed.explicit.get("task", {"kind": "auto"})  # of most the data decide
    assert composed.space and task["kind"] in ("auto", *TASKS)
    build_experiment(composed.explicit)


def test_only_what_somebody_asked_for_is_explicit(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {weight_decay: 1e-3}\n")
    assert compose(path, ["optim.lr=1e-3"]).explicit == {"optim": {"weight_decay": 1e-3, "lr": 1e-3}}
    assert compose(None).explicit == {}


def test_precedence_group_then_file_then_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "defaults: [augment: heavy, _self_]\naugment: {rotate_deg: 7}\n")
    composed = compose(path, ["augment.scale=[0.5,2.0]"])
    assert composed.explicit["augment"]["p_bias_field"] == 0.2  # the group
    assert composed.explicit["augment"]["rotate_deg"] == 7  # the file over the group
    assert composed.explicit["augment"]["scale"] == [0.5, 2.0]  # the command line over both
    plan = {"augment": {"p_bias_field": 0.9, "p_flip": 0.1}}
    experiment = build_experiment(plan, composed.explicit)
    assert (experiment.augment.p_bias_field, experiment.augment.p_flip) == (0.2, 0.1)


@pytest.mark.parametrize("override", ["augment=light", "+augment=light"])
def test_a_group_is_chosen_where_the_file_has_it_and_where_it_has_not(tmp_path: Path, override: str) -> None:
    chosen = write(tmp_path, "defaults: [augment: heavy, _self_]\naugment: {rotate_deg: 7}\n")
    for path in (chosen, write(tmp_path, "augment: {rotate_deg: 7}\n", "plain.yaml")):
        augment = compose(path, [override]).explicit["augment"]
        assert augment["strength"] == 0.5 and augment["rotate_deg"] == 7
    assert compose(None, [override]).explicit["augment"]["strength"] == 0.5


def test_a_task_is_named_without_a_file_of_its_own(tmp_path: Path) -> None:
    """Which tasks there are, whoever has them checks; a folder beside the file may hold a group of that name."""
    asked = write(tmp_path, "defaults: [task: segmentation, _self_]\nseed: 3\n")
    assert compose(asked).explicit == {"task": {"kind": "segmentation"}, "seed": 3}
    assert compose(asked, ["task=ordinal"]).explicit["task"] == {"kind": "ordinal"}
    assert compose(asked, ["~task"]).explicit == {"seed": 3}
    planned = write(tmp_path, "task: {kind: classification}\n", "experiment.yaml")
    assert compose(planned, ["task=ordinal"]).explicit["task"] == {"kind": "ordinal"}, "the command line wins"
    assert compose(None, ["task.kind=ordinal"]).explicit == compose(None, ["task=ordinal"]).explicit
    (tmp_path / "task").mkdir()
    write(tmp_path / "task", "kind: multilabel\n", "findings.yaml")
    assert compose(asked, ["task=findings"]).explicit["task"] == {"kind": "multilabel"}


def test_removing(tmp_path: Path) -> None:
    path = write(tmp_path, "defaults: [augment: heavy, _self_]\noptim: {lr: 1e-2, clip_norm: 1.0}\n")
    assert compose(path, ["~optim.lr"]).explicit["optim"] == {"clip_norm": 1.0}
    assert "optim" not in compose(path, ["~optim"]).explicit
    assert "augment" not in compose(path, ["~augment"]).explicit
    assert compose(path, ["~optim.lr=1e-2"]).explicit["optim"] == {"clip_norm": 1.0}
    with pytest.raises(ConfigError, match="nothing is removed"):
        compose(path, ["~optim.lr=3"])
    with pytest.raises(ConfigError, match=r"neither a config group nor the file sets 'train.ema'"):
        compose(path, ["~train.ema"])


@pytest.mark.parametrize(
    "value",
    [
        "/scans/~neu, (2024)/a=b",
        "Bilder und Röntgen/Ärzte",
        "/数据/肺部",
        "phantom://ct-lesions?seed=1&cases=8",
        "x/{a}[b]:c;'d' \"e\" $HOME ${oc.env:HOME} #f",
        "C:\\scans\\neu",
        "1e-3",
        "null",
        " leading and trailing ",
    ],
)
def test_data_is_taken_as_typed(value: str) -> None:
    composed = compose(None, [f"data={value}"])
    assert composed.explicit["data"] == value
    assert build_experiment(composed.explicit).data == value


def test_data_in_the_home_folder_and_in_quotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/ärztin")
    assert compose(None, ["data=~/scans (1)"]).explicit["data"] == "/home/ärztin/scans (1)"
    assert compose(write(tmp_path, "data: ~/scans\n")).explicit["data"] == "/home/ärztin/scans"
    assert compose(None, ["data='a b'"]).explicit["data"] == "a b"
    with pytest.raises(ConfigError, match="data is empty"):
        compose(None, ["data="])


def test_an_interpolation_is_text_and_reads_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "leaked")
    path = write(tmp_path, 'defaults: [augment: light, _self_]\nmodel: {pretrained: "${oc.env:SECRET}"}\n')
    assert compose(path).explicit["model"]["pretrained"] == "${oc.env:SECRET}"


def test_objectives_have_slashes(tmp_path: Path) -> None:
    path = write(tmp_path, "study: {objectives: {val/dice: max}}\n")
    assert compose(path, ["study.objectives.val/dice=min"]).study.objectives == {"val/dice": "min"}
    both = {"val/dice": "max", "latency_ms": "min"}
    assert compose(path, ["study.objectives.latency_ms=min"]).study.objectives == both
    # Given as a whole they are all that is searched for.
    whole = ["study.objectives={val/auc: max, latency_ms: min}"]
    assert compose(path, whole).study.objectives == {"val/auc": "max", "latency_ms": "min"}
    assert compose(path, ["~study.objectives.val/dice"]).study.objectives == {}
    with pytest.raises(ConfigError, match=r"study.objectives='maxx'.*max \| min"):
        compose(path, ["study.objectives.val/dice=maxx"])


def test_overrides_inside_the_space(tmp_path: Path) -> None:
    path = write(
        tmp_path, "space:\n  optim.lr: {float: [1e-4, 1e-2], log: true}\n  model.name: {choice: [unet, dynunet]}\n"
    )
    space = compose(path, ["space.optim.lr.float=[1e-4,1e-3]", "space.model.name.choice=[unet]"]).space
    assert space == {"optim.lr": {"float": [1e-4, 1e-3], "log": True}, "model.name": {"choice": ["unet"]}}
    assert list(compose(path, ["~space.optim.lr"]).space) == ["model.name"]
    assert compose(path, ["~space.optim.lr.log"]).space["optim.lr"] == {"float": [1e-4, 1e-2]}
    assert compose(path, ["space.optim.lr.choice=[1e-3]"]).space["optim.lr"] == {"choice": [1e-3]}
    added = compose(path, ["+space.loss.alpha={float:[0.2,0.5],when:{loss.name:tversky}}"]).space["loss.alpha"]
    assert added == {"float": [0.2, 0.5], "when": {"loss.name": "tversky"}}
    when = compose(path, ["space.loss.alpha.float=[0.2,0.5]", "space.loss.alpha.when.loss.name=tversky"]).space[
        "loss.alpha"
    ]
    assert when == added
    assert compose(path, ["~space"]).space == compose(path, ["space={}"]).space == {}
    with pytest.raises(ConfigError, match=r"no 'optim.l'. Did you mean optim.lr"):
        compose(path, ["~space.optim.l"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=3", "no 'lr'. Did you mean optim.lr?"),
        ("optim.lrr=3", "no 'optim.lrr'. Did you mean optim.lr"),
        ("epochs=3", "Did you mean train.epochs"),
        ("model.nme=unet", "Did you mean model.name"),
        ("optim.lr.x=3", "'optim.lr' holds a value"),
        ("optim.lr=30", "Allowed: a number > 0, <= 10"),
        ("optim.lr=fast", "Allowed: a number > 0, <= 10"),
        ("optim.lr=nan", "Allowed: a number > 0, <= 10"),
        ("optim.lr=true", "is no number"),
        ("optim.name=adamW", "Did you mean adamw? Allowed: adamw | adam | sgd"),
        ("augment=hevy", "Did you mean heavy?"),
        ("model=unet", "'model' is a section"),
        ("augment.scale=(1,2)", "write a list as [a,b]"),
        ("augment.scale=1,2", "write a list as [1,2]"),
        ("augment.scale=[1,2,3]", "a list of 2 values"),
        ("train.budget=3 fortnights", "is no duration"),
        ("split.fold=7", "must be below split.folds=5"),
        ("space.modl.name.choice=[a]", "no 'modl.name'. Did you mean model.name"),
        ("space.study.trials.int=[1,2]", "'study' is how it is run"),
        ("space.optim.choice=[a]", "varies fields"),
        ("study.name=../up", "study.name='../up'"),
        ("foo", "is no override"),
        ("=3", "is no override"),
        ("", "is no override"),
    ],
)
def test_a_wrong_override_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(None, [override])
    assert message in str(caught.value) and str(caught.value).startswith("command line: ")


def test_a_wrong_file_names_file_and_path(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 30}\n")
    with pytest.raises(ConfigError, match=r"space.yaml: optim.lr=30.*Allowed: a number > 0, <= 10"):
        compose(path)
    assert compose(path, ["optim.lr=1"]).explicit["optim"]["lr"] == 1  # a corrected value is no error
    with pytest.raises(ConfigError, match=r"space.yaml: there is no 'optim.learning_rat'"):
        compose(write(tmp_path, "optim: {learning_rat: 30}\n"))
    with pytest.raises(ConfigError, match=r"space.yaml: space: there is no 'optim.lrr'. Did you mean optim.lr"):
        compose(write(tmp_path, "space: {optim.lrr: {float: [1, 2]}}\n"))
    with pytest.raises(ConfigError, match=r"space.yaml: 'optim' is 3, and it is a section"):
        compose(write(tmp_path, "optim: 3\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: [augmnt: heavy]", "no config group 'augmnt'. Did you mean augment"),
        ("defaults: [augment: hevy]", "has no 'hevy'. Did you mean heavy"),
        ("defaults: {augment: heavy}", "has to be a list"),
        ("defaults: [heavy]", "write it as"),
        ("defaults: [_self_, augment: heavy]", "_self_ has to come last"),
        ("defaults: [augment: ../../secret]", "has no '../../secret'"),
    ],
)
def test_a_wrong_defaults_list_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_users_own_group_lies_beside_his_file(tmp_path: Path) -> None:
    folder = tmp_path / "Räume (neu), ~1"
    (folder / "augment").mkdir(parents=True)
    write(folder / "augment", "defaults: [light, _self_]\np_flip: 0.9\n", "mine.yaml")
    augment = compose(write(folder, "defaults: [augment: mine, _self_]\n")).explicit["augment"]
    assert (augment["p_flip"], augment["strength"]) == (0.9, 0.5)
    write(folder / "augment", "p_flp: 0.9\n", "mine.yaml")
    with pytest.raises(ConfigError, match=r"no 'augment.p_flp'. Did you mean augment.p_flip"):
        compose(folder / "space.yaml")


def test_hydra_of_the_caller_is_left_alone() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(CONF), version_base="1.3"):
        mine = GlobalHydra.instance().hydra
        compose(None, ["augment=heavy"])
        assert GlobalHydra.instance().hydra is mine
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_option_of_every_group_is_valid(path: Path) -> None:
    composed = compose(None, [f"{path.parent.name}={path.stem}"])
    build_experiment(composed.explicit)
    assert composed.explicit[path.parent.name]


def test_a_resolved_experiment_can_be_passed_back_in(tmp_path: Path) -> None:
    import yaml

    experiment = build_experiment(
        compose(None, ["optim=sgd", "train.budget=3min", "preprocess.spacing=[1,1,2]"]).explicit
    )
    path = write(tmp_path, yaml.safe_dump(experiment.model_dump(mode="json")))
    assert build_experiment(compose(path).explicit) == experiment


def test_a_trials_choices_are_a_layer() -> None:
    experiment = build_experiment({"optim": {"name": "sgd"}}, {"optim": {"lr": 0.5}, "seed": 3})
    assert (experiment.optim.name, experiment.optim.lr, experiment.seed) == ("sgd", 0.5, 3)
    with pytest.raises(ConfigError, match=r"optim.lr=-1"):
        build_experiment({"optim": {"lr": -1}})
    with pytest.raises(ConfigError, match=r"no 'optim.lrr'"):
        build_experiment({"optim": {"lrr": 1}})


def test_layers_are_not_changed_by_merging() -> None:
    plan = {"optim": {"lr": 0.1}, "augment": {"scale": [1, 2]}}
    build_experiment(plan, {"optim": {"lr": 0.2}})
    assert plan == {"optim": {"lr": 0.1}, "augment": {"scale": [1, 2]}}


def test_every_field_of_the_schema_is_known() -> None:
    for section, info in Experiment.model_fields.items():
        assert (section,) in known()
        fields = getattr(info.annotation, "model_fields", {})
        assert all((section, name) in known() for name in fields)


def test_batch_size_auto_leaves_the_plan_s_number_and_asks_for_the_micro_batch() -> None:
    plan = {"train": {"batch_size": 24}}
    for asked in ("auto", 16):
        composed = compose(None, [f"train.batch_size={asked}"])
        train = build_experiment(plan, composed.explicit).train
        assert (train.batch_size, train.micro_batch) == ((24, "auto") if asked == "auto" else (16, None))
    train = build_experiment(plan, compose(None, ["train.batch_size=auto", "train.micro_batch=3"]).explicit).train
    assert (train.batch_size, train.micro_batch) == (24, 3)
    assert build_experiment(compose(None, ["train.batch_size=auto"]).explicit).train.batch_size == 8  # without a plan


def test_the_log_variance_follows_the_loss() -> None:
    assert build_experiment({"loss": {"name": "heteroscedastic"}}).model.log_variance is True
    assert not Experiment().model.log_variance
    with pytest.raises(ConfigError, match=r"log_variance=true does not go with loss\.name=dice_ce"):
        build_experiment({"model": {"log_variance": True}})
    with pytest.raises(ConfigError, match=r"log_variance=false does not go with loss\.name=heteroscedastic"):
        build_experiment({"loss": {"name": "heteroscedastic"}, "model": {"log_variance": False}})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.micro_batch=0", "auto, null, or a number of samples"),
        ("train.batch_size=largest", r"train\.batch_size='largest'"),
        ("optim.layer_decay=0", r"optim\.layer_decay=0.*> 0, <= 1"),
        ("optim.sam_rho=-1", r"optim\.sam_rho=-1.*>= 0"),
        ("train.freeze_epochs=3", r"needs model\.pretrained"),
        ("model.dropout_kind=random", "standard | spatial | channel"),
    ],
)
def test_the_training_strategy_s_fields_say_what_they_take(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(None, [override])
