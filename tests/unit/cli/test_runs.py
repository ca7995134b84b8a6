"""``medray runs``: the table and the JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from medray.cli.main import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medray", *arguments])
    try:
        main()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    return 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("seg", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "seg" / "study.yaml").write_text("study: {budget: 120.0, objectives: {val/dice: max}}\n")
    (tmp_path / "seg" / "clock.json").write_text('{"spent": 75.0, "stages": {}}')
    result = {"metric": "dice", "metrics": {"dice": [0.81234, 0.7, None]}, "headline": "Dice 0.81", "seconds": 75.0}
    (tmp_path / "seg" / "result.json").write_text(json.dumps(result))
    (tmp_path / "bad" / "study.yaml").write_text("[")
    return tmp_path


def test_the_table(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "runs", str(folder)) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "kind", "state", "best", "time", "trials", "changed"]
    by_name = {row.split()[0]: row for row in rows}
    assert "ended" in by_name["seg"] and "dice 0.8123" in by_name["seg"] and "1:15/2:00" in by_name["seg"]
    assert "damaged" in by_name["bad"] and "study.yaml is no YAML" in by_name["bad"]


def test_json(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "runs", "--json", str(folder)) == 0
    found = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["seg"]["state"] == "ended" and found["seg"]["best"] == 0.81234 and found["seg"]["budget"] == 120.0
    assert found["bad"]["state"] == "damaged" and found["bad"]["best"] is None


def test_no_runs_and_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "runs", str(tmp_path)) == 0
    assert "no runs in" in capsys.readouterr().out
    assert run(monkeypatch, "runs", "--json", str(tmp_path)) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run(monkeypatch, "runs", str(tmp_path / "none")) == 2
    assert "no such folder" in capsys.readouterr().err
