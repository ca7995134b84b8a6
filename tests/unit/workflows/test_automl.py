"""medray.AutoML: what it asks a study for, and what it shows of one that has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import medray
from medray.config.spaces import names, shipped
from medray.errors import ConfigError, DataError, StudyError
from medray.workflows import study as study_module
from medray.workflows.spaces import space_for

RESULT = {
    "champion": "trial-1",
    "headline": "trial-1: dice 0.7 <of all>",
    "measured_on": "test",
    "cases": 4,
    "metric": "dice",
    "metrics": {"dice": [0.7, 0.64, 0.72], "hd95": [16.0, None, None]},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the study was called with; it ends at once."""
    calls: list[dict[str, Any]] = []

    def tune(path: Path | None, overrides: tuple[str, ...] = (), **more: Any) -> None:
        calls.append(more)
        (more["resume"] / "result.json").write_text(json.dumps(RESULT), encoding="utf-8")
        (more["resume"] / "leaderboard.csv").write_text(
            "trial,state,val/dice,seconds,optim.lr\n1,completed,0.44,12.7,0.005\n0,pruned,0.41,3.1,\n", encoding="utf-8"
        )
        (more["resume"] / "report.html").write_text('<p>"all" & more</p>', encoding="utf-8")

    monkeypatch.setattr(study_module, "tune", tune)
    return calls


def stored(study: medray.AutoML) -> dict[str, Any]:
    return yaml.safe_load((study.directory / "study.yaml").read_text(encoding="utf-8"))


def test_what_is_asked_for_in_python_is_what_the_study_holds(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    study = medray.AutoML(
        "phantom://xray-nodules?cases=8&size=16", task="classification", metric="log_loss", trials=7, budget="2min",
        space={"optim.lr": {"float": [1e-5, 1e-2], "log": True}, "model.name": {"choice": ["small_cnn", "resnet18"]},
               "model.dropout": {"float": [0.0, 0.5], "when": {"model.name": "small_cnn"}}},
        name="notebook", overrides=["optim.weight_decay=0.1"], runs=tmp_path / "my runs",
    )  # fmt: skip
    assert study.optimize() is study
    held = stored(study)
    assert held["source"] == "phantom://xray-nodules?cases=8&size=16"
    assert held["study"]["objectives"] == {"val/log_loss": "min"}
    assert (held["study"]["trials"], held["study"]["budget"], held["study"]["name"]) == (7, 120.0, "notebook")
    assert held["space"]["optim.lr"] == {"float": [1e-5, 1e-2], "log": True}
    assert held["space"]["model.dropout"]["when"] == {"model.name": "small_cnn"}
    assert held["explicit"]["optim"] == {"weight_decay": 0.1} and held["explicit"]["task"]["kind"] == "classification"
    assert study.directory == (tmp_path / "my runs" / "notebook").resolve()

    study.optimize()
    assert [call["resume"] for call in asked] == [study.directory] * 2  # the same study goes on, none is begun anew


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("phantom://xray-nodules?cases=4&size=16", "cls"),
        ("phantom://fundus-vessels?cases=4&size=16", "seg"),
        ("phantom://ct-lesions?cases=4&size=16", "seg3d"),
    ],
)
def test_without_a_space_the_one_that_suits_the_data_is_taken(
    data: str, name: str, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    assert space_for([f"data={data}"]) == shipped(name)
    study = medray.AutoML(data, runs=tmp_path).optimize()
    assert stored(study)["study"]["name"] == name and stored(study)["space"]


def test_a_metric_takes_the_place_of_the_spaces_own(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    data = "phantom://xray-nodules?cases=4&size=16"
    for space in (None, "cls"):
        study = medray.AutoML(data, metric="balanced_accuracy", space=space, runs=tmp_path).optimize()
        assert stored(study)["study"]["objectives"] == {"val/balanced_accuracy": "max"}


def test_data_and_overrides_that_the_space_answers_for(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert space_for(["data=phantom://xray-findings?cases=4&size=16"]) == shipped("cls")
    study = medray.AutoML(
        "phantom://xray-findings?cases=4&size=16", overrides=["~space.optim.lr", "~augment"], runs=tmp_path
    ).optimize()
    held = stored(study)
    assert "optim.lr" not in held["space"] and held["space"] and "kind" not in held["explicit"].get("task", {})


def test_numpy_s_numbers_are_numbers(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    import numpy as np

    study = medray.AutoML(
        "phantom://xray-nodules?cases=4&size=16", runs=tmp_path,
        space={"optim.lr": {"choice": list(np.geomspace(1e-3, 1e-1, 3))}, "train.epochs": {"int": [np.int64(1), 3]}},
    ).optimize()  # fmt: skip
    assert stored(study)["space"]["optim.lr"]["choice"] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert stored(study)["space"]["train.epochs"]["int"] == [1, 3]


def test_what_was_answered_before_is_not_written_over(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from medray.workflows import prediction

    folders: list[Path] = []

    def answer(bundle: Path, inputs: Any, folder: Path, *more: Any, **others: Any) -> Any:
        folder.mkdir()
        folders.append(folder)
        return SimpleNamespace(answers=())

    monkeypatch.setattr(prediction, "predict_files", answer)
    study = medray.AutoML("phantom://fundus-vessels?cases=4&size=16", runs=tmp_path).optimize()
    for _ in range(2):
        study.predict("x.png")
    assert [folder.name for folder in folders] == ["predictions", "predictions-2"]


def test_a_table_of_columns_gets_its_own_space(tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("age,label\n" + "".join(f"{40 + n},{n % 2}\n" for n in range(10)), encoding="utf-8")
    assert space_for([f"data={table}?columns=*"]) == shipped("table")


def test_a_data_frame_is_kept_as_a_table_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for n in range(4):
        Image.new("L", (16, 16), n).save(f"scans/{n}.png")
    frame = pd.DataFrame({"image": [Path("scans") / f"{n}.png" for n in range(4)], "label": ["a", "b"] * 2})
    study = medray.AutoML(frame, runs="runs").optimize()
    kept = pd.read_csv(stored(study)["source"])
    assert kept["image"].tolist() == [str(tmp_path / "scans" / f"{n}.png") for n in range(4)]
    assert frame["image"][0] == Path("scans/0.png")  # the caller's own is left alone
    assert Path(stored(study)["source"]).stat().st_mode & 0o077 == 0
    with pytest.raises(DataError, match=r"no column 'image'.*files, label"):
        medray.AutoML(frame.rename(columns={"image": "files"}))
    with pytest.raises(DataError, match="list"):
        medray.AutoML([1, 2])  # type: ignore[arg-type]


def test_an_ended_study_shows_leaderboard_champion_and_report(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    data = "phantom://fundus-vessels?cases=4&size=16"
    study = medray.AutoML.load(medray.AutoML(data, runs=tmp_path, name="x").optimize().directory)
    board = study.leaderboard()
    assert board.index.tolist() == [1, 0] and board.loc[1, "optim.lr"] == 0.005
    champion = study.champion()
    assert (champion.name, champion.metrics["dice"], champion.cases) == ("trial-1", (0.7, 0.64, 0.72), 4)
    shown = study._repr_html_()
    assert "dice 0.7 &lt;of all&gt;" in shown and "0.640 to 0.720" in shown and "n/a" in shown
    inside = study.report()._repr_html_()
    assert "&lt;p&gt;&quot;all&quot; &amp; more" in inside and "sandbox" in inside


def test_a_study_that_has_not_ended_says_what_to_do(tmp_path: Path) -> None:
    study = medray.AutoML("phantom://fundus-vessels?cases=4&size=16", runs=tmp_path)
    for ask in (study.leaderboard, study.champion, study.report, lambda: study.predict("x.png")):
        with pytest.raises(StudyError, match=r"optimize\(\)"):
            ask()
    assert "not begun" in study._repr_html_()
    with pytest.raises(StudyError, match="no study"):
        medray.AutoML.load(tmp_path / "nothing")


def test_wrong_names_are_refused_before_anything_starts(tmp_path: Path) -> None:
    assert {"cls", "seg", "seg3d", "table"} <= set(names())
    with pytest.raises(ConfigError, match="seg3d"):
        medray.AutoML("phantom://ct-lesions", space="seg3")
    with pytest.raises(ConfigError, match="set"):
        medray.AutoML("phantom://ct-lesions", space={"optim.lr": {"choice": {1e-3}}})
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        medray.AutoML("phantom://ct-lesions", space={"optim.rl": {"float": [0.1, 1.0]}}, runs=tmp_path).optimize()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no data"):
        space_for(["study.trials=2"])
