"""Two studies side by side, from their files; scoring the bundles is ``medray evaluate``'s, and tested there."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medray.cli.main import main
from medray.config.schema import SplitConfig, StudyConfig
from medray.errors import StudyError
from medray.learn.intervals import Interval
from medray.workflows import comparison
from medray.workflows.asked import Asked, save
from medray.workflows.comparison import compare_studies
from medray.workflows.planning import dump, prepare_directory
from medray.workflows.recipe import Recipe


def study(folder: Path, *, source: str = "phantom://xray-nodules?cases=14&size=32", **split: Any) -> Path:
    """An ended study's files, all but its bundle."""
    folder.mkdir()
    prepare_directory(source, folder)
    explicit = {"split": SplitConfig(**split).model_dump(), "device": "cpu"}
    recipe = Recipe(directory=str(folder), explicit=explicit, cache="cache")
    (folder / "experiment.yaml").write_text(dump(recipe.experiment()), encoding="utf-8")
    config = StudyConfig.model_validate({"name": folder.name, "objectives": {"val/auc": "max"}})
    save(folder, Asked(source=source, explicit=explicit, study=config, space={"optim.lr": {}}, command="medray tune"))
    result = {
        "champion": "trial-3", "headline": "trial-3: auc 0.9", "metric": "auc", "seconds": 75.0,
        "metrics": {"auc": [0.9, 0.8, None]}, "selection": {"why": "trial-3: it is nearest to the ideal"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    rows = "trial,state,val/auc,seconds,optim.lr\n3,completed,0.9,10.0,0.01\n0,completed,0.8,10.0,0.001\n"
    (folder / "leaderboard.csv").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How the bundles were scored."""
    calls: list[dict[str, Any]] = []

    def evaluate(bundle: Path, manifest: Any, **how: Any) -> Any:
        calls.append({"bundle": bundle, "manifest": manifest, **how})
        difference = {"auc": Interval(0.02, -0.01, 0.05), "ece": Interval(0.1, math.nan, math.nan)}
        return SimpleNamespace(comparison=SimpleNamespace(difference=difference), cases=len(how["cases"]), patients=2)

    monkeypatch.setattr(comparison, "evaluate", evaluate)
    return calls


def test_the_same_cases_are_compared_pairwise(tmp_path: Path, scored: list[dict[str, Any]]) -> None:
    one, other = study(tmp_path / "one"), study(tmp_path / "other")
    found = compare_studies(one, other)
    assert found.difference is not None and found.difference["auc"] == (0.02, -0.01, 0.05)
    assert "test cases" in found.reason and "optimistic" not in found.reason
    (call,) = scored
    recipe = Recipe(directory=str(one), explicit={}, cache="cache")
    assert tuple(call["cases"]) == recipe.splits(recipe.experiment()).test and call["compare"] == other / "bundle"
    assert call["runtime"] == "torch", "one has no ONNX file"
    first = found.studies[0]
    assert first.value[:2] == (0.9, 0.8) and math.isnan(first.value.high)
    assert [row["trial"] for row in first.leaderboard] == ["3", "0"] and "nearest" in first.why


def test_without_test_cases_it_is_said_to_be_optimistic(tmp_path: Path, scored: list[dict[str, Any]]) -> None:
    found = compare_studies(study(tmp_path / "one", test=0.0), study(tmp_path / "other", test=0.0))
    assert "validation cases" in found.reason and "optimistic" in found.reason and scored


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"source": "phantom://xray-nodules?cases=16&size=32"}, "different images"), ({"seed": 3}, "split the cases")],
)
def test_other_cases_are_not_compared(
    tmp_path: Path, scored: list[dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    found = compare_studies(study(tmp_path / "one"), study(tmp_path / "other", **changes))
    assert found.difference is None and said in found.reason and not scored


def test_what_is_no_ended_study_is_said(tmp_path: Path) -> None:
    one = study(tmp_path / "one")
    with pytest.raises(StudyError, match="no study"):
        compare_studies(one, tmp_path)
    (one / "result.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(StudyError, match="can't be read"):
        compare_studies(one, one)
    (one / "result.json").unlink()
    with pytest.raises(StudyError, match=r"has not ended.*--resume"):
        compare_studies(one, one)


@pytest.mark.usefixtures("scored")
def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = str(study(tmp_path / "one")), str(study(tmp_path / "other"))
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["medray", "studies", "compare", one, other, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        printed = capsys.readouterr().out
        if words:
            assert json.loads(printed)["difference"] == {"auc": [0.02, -0.01, 0.05], "ece": [0.1, None, None]}
        else:
            assert "auc     0.02 [-0.01, 0.05]" in printed and "0.9 [0.8" not in printed and "nearest" in printed
