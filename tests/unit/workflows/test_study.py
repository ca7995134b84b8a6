"""What a study decides without training: its folder, what a resume may change, the expected gain, its last files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from medray.config.schema import StudyConfig
from medray.engines.ray.session import RaySession
from medray.errors import ConfigError, StudyError
from medray.report.data import Gain, Interval
from medray.search.past import Proposal, read_study
from medray.search.trial import TrialRecord
from medray.workflows.asked import Asked, new, resumed, save
from medray.workflows.conclusion import (
    Concluded,
    _headline,
    _leaderboard,
    _losses,
    _trial_row,
    _warm_note,
    _warm_rows,
)
from medray.workflows.study import _Study

SPACE = """
data: phantom://ct-lesions?cases=6&size=16
study: {name: seg, budget: 2min, trials: 3, objectives: {val/dice: max}}
optim: {weight_decay: 0.5}
space:
  optim.lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return path


# The folder ----------------------------------------------------------------------------------------------------------


def test_a_new_study_never_touches_another_ones_folder(space, tmp_path):
    runs = tmp_path / "runs"
    folders = [new(space, [], runs)[0] for _ in range(3)]
    assert [folder.name for folder in folders] == ["seg", "seg-2", "seg-3"]
    (runs / "empty").mkdir()
    assert new(space, ["study.name=empty"], runs)[0].name == "empty"


def test_what_was_asked_for_is_kept(space, tmp_path):
    folder, asked = new(space, ["optim.lr=0.25", "study.trials=7"], tmp_path / "runs")
    assert asked.source == "phantom://ct-lesions?cases=6&size=16"
    assert asked.explicit["optim"] == {"weight_decay": 0.5, "lr": 0.25}
    assert (asked.study.trials, asked.study.budget) == (7, 120.0)
    assert asked.command == f"medray tune {space} optim.lr=0.25 study.trials=7"
    assert resumed(folder, []) == (folder, asked)


def test_a_space_that_cannot_be_makes_no_folder(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE.replace("[1.0e-4, 1.0e-2]", "[1.0, 0.1]"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        new(path, [], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# Resuming ------------------------------------------------------------------------------------------------------------


def test_a_resumed_study_may_get_more_trials_and_time_and_remembers_them(space, tmp_path):
    folder, asked = new(space, [], tmp_path / "runs")
    _, changed = resumed(folder, ["study.trials=9", "study.budget=1h"])
    assert (changed.study.trials, changed.study.budget) == (9, 3600.0)
    assert changed.study.model_copy(update={"trials": 3, "budget": 120.0}) == asked.study
    assert (changed.explicit, changed.space, changed.command) == (asked.explicit, asked.space, asked.command)
    assert resumed(folder, [])[1] == changed
    assert [p.name for p in folder.iterdir()] == ["study.yaml"]


def test_a_resumed_study_may_loosen_its_limits(space, tmp_path):
    folder, _ = new(space, ["study.select.limits.latency_ms=50", "study.select.limits.size_mb=1"], tmp_path / "runs")
    _, changed = resumed(folder, ["study.select.limits.latency_ms=80", "study.select.on_fail=last"])
    assert changed.study.select.limits.given == {"latency_ms": 80.0, "size_mb": 1.0}
    assert changed.study.select.on_fail == "last" and resumed(folder, [])[1] == changed
    with pytest.raises(ConfigError):
        resumed(folder, ["study.select.rule=weighted"])


@pytest.mark.parametrize(
    "override",
    ["optim.lr=0.1", "data=elsewhere", "study.seed=1", "study.sampler=random", "study.objectives={val/dice: min}",
     "+space.optim.momentum={float: [0.1, 0.9]}", "augment=heavy", "study.name=other"],
)  # fmt: skip
def test_a_resumed_study_may_change_nothing_else(space, tmp_path, override):
    folder, _ = new(space, [], tmp_path / "runs")
    before = (folder / "study.yaml").read_text(encoding="utf-8")
    with pytest.raises(ConfigError):
        resumed(folder, ["study.trials=9", override])
    assert (folder / "study.yaml").read_text(encoding="utf-8") == before


def test_where_there_is_no_study_the_message_says_so(tmp_path):
    with pytest.raises(StudyError, match=r"no study to resume.*study\.yaml"):
        resumed(tmp_path, [])


@pytest.mark.parametrize(
    "text", ["", "a: [", "[]", "12", "source: x", "{source: x, explicit: 3, study: {}, space: {}, command: c}",
             "{source: x, explicit: {}, study: {budget: -1}, space: {}, command: c}",
             "!!python/object/apply:os.system ['true']"],
)  # fmt: skip
def test_a_damaged_study_is_refused(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match="damaged"):
        resumed(tmp_path, [])


def test_a_study_is_written_with_any_text(tmp_path):
    asked = Asked(source="données/肺: #1", explicit={"data": "x: y"}, study=StudyConfig(), space={}, command="m 'é'")
    save(tmp_path, asked)
    assert resumed(tmp_path, [])[1] == asked


# The last files ------------------------------------------------------------------------------------------------------


def gain(**changes):
    nothing = Interval(value=math.nan)
    fields = {"metric": "dice", "default": Interval(value=0.5, low=0.4, high=0.6), "champion": nothing,
              "difference": nothing, "measured_on": "test", "cases": 2, "patients": 2}  # fmt: skip
    return Gain(**(fields | changes))


def test_the_result_is_json_that_any_program_reads(tmp_path):
    result = Concluded(
        champion="default",
        headline="h",
        gain=gain(),
        metrics={"dice": (0.5, 0.4, 0.6), "hd95": (math.nan,) * 3},
        time={"final fit": 61.23},
    )
    result.save(tmp_path / "result.json", seconds=12.0)

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    found = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["metrics"] == {"dice": [0.5, 0.4, 0.6], "hd95": [None] * 3}
    assert found["time"] == {"final fit": 61.2}
    assert found["default"] == [0.5, 0.4, 0.6] and found["difference"] == [None] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def record(number, state, **changes):
    fields = {"number": number, "state": state, "params": {"optim.lr": 0.1}, "is_default": False, "in_space": True,
              "metrics": {}, "values": None, "fraction": 1.0, "seconds": 1.0, "stopped": "", "history": (),
              "extras": {}, "error": None, "directory": Path()}  # fmt: skip
    return TrialRecord(**(fields | changes))


@pytest.mark.parametrize(("direction", "first"), [("max", "2"), ("min", "1")])
def test_the_leaderboards_first_row_is_the_best(tmp_path, direction, first):
    records = (
        record(0, "completed", metrics={"val/dice": math.nan}),
        record(1, "completed", metrics={"val/dice": 0.2}),
        record(4, "failed"),
        record(2, "completed", metrics={"val/dice": 0.9}),
        record(3, "pruned", metrics={"val/dice": 0.99}, params={"model.name": "unet"}),
    )
    path = tmp_path / "leaderboard.csv"
    _leaderboard(path, SimpleNamespace(objective=("val/dice", direction), records=records))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trials = [row["trial"] for row in rows]
    assert trials[0] == first and trials[2:] == ["0", "3", "4"]
    assert rows[3]["model.name"] == "unet" and rows[3]["optim.lr"] == ""


def test_the_report_says_what_was_lost_with_a_machine():
    records = (
        record(0, "completed", is_default=True, losses=("10.0.0.2",)),
        record(1, "completed"),
        record(2, "pruned", losses=("10.0.0.2", "10.0.0.3")),
    )
    assert _losses(records) == {
        "Lost and run again": "3: trial 0 on 10.0.0.2, trial 2 on 10.0.0.2, trial 2 on 10.0.0.3"
    }
    assert _trial_row(records[0]).note == "the plan's default; lost on 10.0.0.2, run again"
    assert _losses(records[1:2]) == {} and _trial_row(records[1]).note == ""


def test_the_report_says_what_came_of_what_others_found():
    early = Proposal(params={"optim.lr": 0.1}, origin="liver", distance=0.4, gain=0.05)
    records = (
        record(0, "completed", values=(0.5,), metrics={"val/loss": 0.5}),
        record(1, "completed", values=(0.3,), metrics={"val/loss": 0.3}, proposal=early),
        record(2, "pruned", metrics={"val/loss": 0.1}, proposal=early),
    )
    asked = SimpleNamespace(objective=("val/loss", "min"), records=records, study=StudyConfig())
    first, second = _warm_rows(asked)
    assert (first.trial, first.origin, first.distance, first.there) == (1, "liver", 0.4, 0.05)
    assert first.here == pytest.approx(0.2) and second.here is None  # what was stopped has come to nothing yet
    assert _trial_row(records[1]).note == "from liver"
    assert _warm_note(SimpleNamespace(study=StudyConfig(warm_start=False), records=records)).startswith("Off")
    assert _warm_note(SimpleNamespace(study=StudyConfig(), records=())) == "There was no search."


def test_a_study_that_ended_is_a_past_study_for_the_next(tmp_path):
    """What the leaderboard writes of every kind of value, a later study reads as it was."""
    from tests.unit.search.test_past import fingerprint

    params = {"a.rate": 1e-05, "a.flag": True, "a.sizes": [32, 64], "a.name": "dice_ce", "a.count": 3}
    records = (
        record(0, "completed", metrics={"val/dice": 0.5}, params=dict.fromkeys(params, 1)),
        record(1, "completed", metrics={"val/dice": 0.75}, params=params | {"a.none": None}),  # is left to the default
    )
    _leaderboard(tmp_path / "leaderboard.csv", SimpleNamespace(objective=("val/dice", "max"), records=records))
    save(tmp_path, Asked(source="x", explicit={}, study=StudyConfig(), space={}, command="c"))
    fingerprint().save(tmp_path / "fingerprint.json")
    found = read_study(tmp_path)
    assert found is not None and found.objective == "val/dice"
    assert [(tried.params, tried.gain) for tried in found.best] == [(params, 0.25)]


def test_the_headline_says_what_was_measured_where():
    won = gain(
        champion=Interval(value=0.9, low=0.8, high=0.95), difference=Interval(value=0.05, low=-0.01, high=0.1),
        cases=12,
    )  # fmt: skip
    text = _headline("trial-3", "dice", won)
    assert text == (
        "trial-3: dice 0.900 (95 % CI 0.800 to 0.950) on 12 test cases; "
        "+0.050 (-0.010 to +0.100) over the plan's default"
    )
    assert "nothing better" in _headline("default", "dice", won)
    assert "optimistic" in _headline("trial-3", "dice", gain(measured_on="validation"))


@pytest.mark.parametrize(
    ("session", "concurrency", "shares"),
    [
        (RaySession(cpus=8, gpus=0, is_local=False, most_cpus=4), 1, (1, 4, 0.0)),
        (RaySession(cpus=8, gpus=0, is_local=False, most_cpus=4), None, (4, 2, 0.0)),
        (RaySession(cpus=40, gpus=4, is_local=False, most_cpus=16), 2, (2, 16, 1.0)),
        (RaySession(cpus=32, gpus=4, is_local=False, most_cpus=8), None, (4, 8, 1.0)),
    ],
)
def test_a_trial_asks_for_no_more_than_one_machine_has(
    session: RaySession, concurrency: int | None, shares: tuple[int, int, float]
) -> None:
    """One that asked for more would wait for ever."""
    study = object.__new__(_Study)
    study.workers = 1
    study.asked = SimpleNamespace(study=SimpleNamespace(concurrency=concurrency))
    assert study._shares(session) == shares


def test_what_was_fitted_before_stands_behind_the_default(tmp_path: Path) -> None:
    """Of a study that goes on with another rule: the gain is stated over the first finalist."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from medray.workflows.study import _Study

    for name in ("default", "trial-3", "trial-3-twin-1"):
        (tmp_path / "final" / name).mkdir(parents=True)
    study = object.__new__(_Study)
    study.directory, study.searched, study.workers = tmp_path, (), 1
    vars(study).update(
        chooser=SimpleNamespace(is_plain=False), clock=SimpleNamespace(stage=lambda _: nullcontext()),
        asked=SimpleNamespace(study=SimpleNamespace(ensemble=False)), _pick=lambda _: None,
        forecast=SimpleNamespace(finish=lambda _: 0.0),
        _finalist=lambda name: name if (tmp_path / "final" / name).is_dir() else None,
    )  # fmt: skip
    found = study._final([], SimpleNamespace(gpus=0))  # type: ignore[arg-type]
    assert [name for name, _ in found] == ["default", "trial-3"]
