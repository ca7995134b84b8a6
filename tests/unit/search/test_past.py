"""What earlier studies say to a new one: how near, what of it fits, and what hostile files can't do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from medray.config.schema import StudyConfig
from medray.data.fingerprint import ChannelStats, Fingerprint
from medray.search.driver import StudyDriver
from medray.search.past import Past, Portfolio, Proposal, Tried, distance, propose, read_study, shipped, studies_in
from medray.search.space import Space
from medray.search.trial import TrialOutcome

SPACE = Space.parse(
    {
        "model.name": {"choice": ["unet", "segresnet"]},
        "optim.lr": {"float": [1e-4, 1e-2], "log": True},
        "loss.name": {"choice": ["dice_ce", "tversky"]},
        "loss.alpha": {"float": [0.2, 0.5], "when": {"loss.name": "tversky"}},
    }
)
DEFAULT = {"model.name": "unet", "optim.lr": 1e-3, "loss.name": "dice_ce", "loss.alpha": 0.3}


def fingerprint(**changes: Any) -> Fingerprint:
    fields: dict[str, Any] = {
        "task": "segmentation",
        "ndim": 2,
        "channels": 1,
        "modality": "CT",
        "classes": ("background", "lesion"),
        "cases": 100,
        "patients": 100,
        "sites": {},
        "shape_min": (64, 64),
        "shape_median": (64, 64),
        "shape_max": (64, 64),
        "spacing_min": None,
        "spacing_median": None,
        "spacing_max": None,
        "intensity": (ChannelStats(mean=0, std=1, p005=-1, p50=0, p995=1),),
        "class_cases": {"background": 100, "lesion": 50},
        "class_fraction": {"background": 0.9, "lesion": 0.1},
        "bytes_total": 1,
        "digest": "a",
    }
    return Fingerprint(**(fields | changes))


def past(name: str, best: list[tuple[dict[str, Any], float]], *, objective: str = "val/dice", **changes: Any) -> Past:
    tried = tuple(Tried(params=params, gain=gain) for params, gain in best)
    return Past(name=name, objective=objective, fingerprint=fingerprint(digest=name, **changes), best=tried)


def test_the_same_data_is_nearest_and_other_tasks_never_near() -> None:
    own = fingerprint()
    assert distance(own, fingerprint(cases=3, modality="MR")) == 0.0  # the same pixels, whatever was asked of them
    near, far = (
        fingerprint(digest="b", cases=120),
        fingerprint(digest="c", cases=120, modality="MR", shape_median=(512, 512)),
    )
    assert 0 < distance(own, near) < 0.2 < distance(own, far)
    assert distance(own, near) == distance(near, own)
    assert distance(own, fingerprint(digest="d", ndim=3)) == math.inf
    assert distance(own, fingerprint(digest="e", task="classification")) == math.inf


def test_the_nearest_speak_first_and_in_turn() -> None:
    found = propose(
        SPACE,
        DEFAULT,
        fingerprint(),
        [
            past("far", [({"optim.lr": 5e-3}, 0.3)], cases=800),
            past("near", [({"optim.lr": 2e-3}, 0.1), ({"optim.lr": 4e-3}, 0.05)], cases=110),
            past("elsewhere", [({"optim.lr": 9e-3}, 0.9)], ndim=3),
            past("much too far", [({"optim.lr": 8e-3}, 0.9)], shape_median=(8192, 8192), modality="MR"),
            past("other metric", [({"optim.lr": 7e-3}, 0.9)], objective="val/auc"),
        ],
        objective="val/dice",
        count=3,
    )
    assert [(p.origin, p.params["optim.lr"]) for p in found] == [("near", 2e-3), ("far", 5e-3), ("near", 4e-3)]
    assert all(SPACE.contains(p.params) for p in found)
    assert found[0].distance < found[1].distance


def test_only_what_the_space_holds_is_proposed() -> None:
    best = [
        ({"optim.lr": 5e-3, "model.name": "swin_unetr", "train.epochs": 3}, 0.2),  # the rate alone fits
        ({"optim.lr": 1e-3, "loss.name": "dice_ce"}, 0.1),  # is the default
        ({"optim.lr": "5e-3", "loss.name": ["tversky"]}, 0.1),  # nothing fits
        ({"loss.name": "tversky", "loss.alpha": 7.0}, 0.1),  # alpha is the default's
        ({"optim.lr": math.inf}, 0.1),
    ]
    found = propose(SPACE, DEFAULT, fingerprint(), [past("x", best)], objective="val/dice", count=9)
    assert [p.params for p in found] == [
        {"model.name": "unet", "optim.lr": 5e-3, "loss.name": "dice_ce"},
        {"model.name": "unet", "optim.lr": 1e-3, "loss.name": "tversky", "loss.alpha": 0.3},
    ]
    assert propose(SPACE, DEFAULT, fingerprint(), [past("x", best)], objective="val/dice", count=0) == []


def test_a_default_outside_of_the_space_leaves_a_hole_that_nothing_fills() -> None:
    found = propose(
        SPACE,
        DEFAULT | {"model.name": "dynunet"},
        fingerprint(),
        [past("x", [({"optim.lr": 5e-3}, 0.2), ({"optim.lr": 5e-3, "model.name": "segresnet"}, 0.1)])],
        objective="val/dice",
        count=9,
    )
    assert [p.params["model.name"] for p in found] == ["segresnet"]


# Files ---------------------------------------------------------------------------------------------------------------

BOARD = """trial,state,val/dice,seconds,loss.name,optim.lr,train.patch_size
3,completed,0.9,10.0,tversky,1e-05,"[32, 32]"
1,completed,0.85,10.0,dice_ce,0.002,None
0,completed,0.8,10.0,dice_ce,0.001,None
2,completed,0.7,10.0,dice_ce,0.01,None
4,pruned,0.95,1.0,dice_ce,0.01,None
"""


def folder(runs: Path, name: str = "old", board: str = BOARD, direction: str = "max") -> Path:
    made = runs / name
    made.mkdir(parents=True)
    asked = {"study": {"objectives": {"val/dice": direction}}}
    (made / "study.yaml").write_text(yaml.safe_dump(asked), encoding="utf-8")
    (made / "leaderboard.csv").write_text(board, encoding="utf-8")
    fingerprint().save(made / "fingerprint.json")
    return made


def test_a_study_is_read_from_its_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    found = studies_in(tmp_path)
    assert [(study.name, study.objective, study.direction) for study in found] == [("old", "val/dice", "max")]
    best = found[0].best
    assert [tried.gain for tried in best] == pytest.approx([0.1, 0.05])  # what was pruned never ended
    assert best[0].params == {"loss.name": "tversky", "optim.lr": 1e-5, "train.patch_size": [32, 32]}
    assert studies_in(tmp_path, besides=tmp_path / "old") == []
    assert studies_in(tmp_path / "nowhere") == []


def test_a_metric_to_be_minimised_gains_downwards(tmp_path: Path) -> None:
    found = read_study(folder(tmp_path, direction="min"))
    assert found is not None and [tried.gain for tried in found.best] == pytest.approx([0.1])
    assert found.best[0].params["optim.lr"] == 0.01


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("study.yaml", "!!python/object/apply:os.system ['touch PWNED']"),
        ("study.yaml", "study: [1"),
        ("study.yaml", "[]"),
        ("leaderboard.csv", ""),
        ("leaderboard.csv", "trial,state,val/dice,seconds\n"),
        ("leaderboard.csv", BOARD.replace("0,completed,0.8", "0,failed,")),  # no default to compare with
        ("leaderboard.csv", BOARD.replace("0.8,", "nan,")),
        ("leaderboard.csv", "x" * (3 << 20)),
        ("leaderboard.csv", "\x00\x00"),
        ("fingerprint.json", "{}"),
        ("fingerprint.json", "[" * 100_000),
    ],
)
def test_a_damaged_or_hostile_folder_is_no_past_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made = folder(tmp_path / "runs")
    (made / name).write_text(text, encoding="utf-8")
    assert read_study(made) is None
    assert not (tmp_path / "PWNED").exists()


def test_values_are_literals_and_nothing_is_run(tmp_path: Path) -> None:
    hostile = "__import__('os').system('touch PWNED')"
    board = BOARD.replace("tversky", f'"{hostile}"')
    found = read_study(folder(tmp_path, board=board))
    assert found is not None and found.best[0].params["loss.name"] == hostile
    proposals = propose(SPACE, DEFAULT, fingerprint(), [found], objective="val/dice", count=3)
    assert [p.params["loss.name"] for p in proposals] == ["dice_ce"]


def test_a_portfolio_that_is_not_there_or_damaged_is_empty(tmp_path: Path) -> None:
    assert shipped(tmp_path / "none.json") == []
    (tmp_path / "bad.json").write_text('{"version": 2}', encoding="utf-8")
    assert shipped(tmp_path / "bad.json") == []
    Portfolio(studies=(past("x", [({"optim.lr": 1e-2}, 0.1)]),)).save(tmp_path / "good.json")
    assert [study.name for study in shipped(tmp_path / "good.json")] == ["x"]


def test_the_shipped_portfolio_can_be_read() -> None:
    found = shipped()
    assert found and all(study.best and all(tried.gain > 0 for tried in study.best) for study in found)


# In a study ----------------------------------------------------------------------------------------------------------


def proposals(*rates: float) -> list[Proposal]:
    base = {"model.name": "unet", "loss.name": "dice_ce"}
    return [Proposal(params=base | {"optim.lr": rate}, origin="old", distance=0.5, gain=0.1) for rate in rates]


def driver(directory: Path, early: list[Proposal], default: dict[str, Any] = DEFAULT) -> StudyDriver:
    return StudyDriver(SPACE, StudyConfig(trials=8, pruner="none"), {"val/dice": "max"}, directory, default, early)


def ask(study: StudyDriver) -> dict[str, Any]:
    task = study.ask()
    assert task is not None
    study.complete(task.number, TrialOutcome(metrics={"val/dice": 0.5}))
    return dict(task.params)


@pytest.mark.parametrize("default", [DEFAULT, DEFAULT | {"optim.lr": 0.5}], ids=["inside", "outside"])
def test_what_won_elsewhere_comes_right_after_the_default(tmp_path: Path, default: dict[str, Any]) -> None:
    with driver(tmp_path, proposals(5e-3, 7e-3, 0.9), default) as study:  # the last is not of the space
        drawn = [ask(study) for _ in range(4)]
        assert [row["optim.lr"] for row in drawn[:3]] == [default["optim.lr"], 5e-3, 7e-3]
        assert drawn[3]["optim.lr"] not in (5e-3, 7e-3)
        records = study.records()
    assert [record.proposal.origin if record.proposal else None for record in records] == [None, "old", "old", None]


def test_a_study_goes_on_with_the_proposals_that_it_began_with(tmp_path: Path) -> None:
    with driver(tmp_path / "a", proposals(5e-3, 7e-3)) as study:
        whole = [ask(study) for _ in range(5)]
    parts = []
    for number in range(5):  # other runs have ended meanwhile, and say something else
        with driver(tmp_path / "b", proposals(5e-3, 7e-3) if number == 0 else proposals(2e-4)) as study:
            parts.append(ask(study))
    assert parts == whole


def test_a_trial_that_was_queued_but_not_begun_is_taken_up_once(tmp_path: Path) -> None:
    with driver(tmp_path, proposals(5e-3)) as study:
        ask(study)
        study._study.enqueue_trial(SPACE.encode(study._proposals[0]["params"]))  # and there the process died
    with driver(tmp_path, []) as study:
        assert ask(study)["optim.lr"] == 5e-3
        assert ask(study)["optim.lr"] != 5e-3
