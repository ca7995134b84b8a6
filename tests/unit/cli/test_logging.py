"""--log-format and --log-level: anywhere on the line; stdout keeps the results, stderr holds JSON alone."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from medray.cli.main import main
from medray.cli.show import progress
from medray.errors import StudyError
from medray.workflows.events import StudyEvent
from medray.workflows.sitting import sitting


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medray", *arguments])
    try:
        main()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    return 0


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for the study's workflow; ``error`` is raised at its end."""
    import medray.workflows

    settings = SimpleNamespace(error=None, folder=tmp_path / "seg")

    def tune(*_: Any, observer: Any, **__: Any) -> SimpleNamespace:
        with sitting(settings.folder, "study", observer=observer) as told:
            told(StudyEvent(kind="stage", text="searching", elapsed=1))
            logging.getLogger("medray.train").warning("halved")
            logging.getLogger("medray.train").debug("fine")
            with progress("checking") as show:
                show(3, 3, "x")
            if settings.error is not None:
                raise settings.error
        return SimpleNamespace(headline="Dice 0.9", report=Path("report.html"), bundle=Path("bundle"))

    stand_in = ModuleType("medray.workflows.study")
    stand_in.tune = tune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medray.workflows.study", stand_in)
    monkeypatch.setattr(medray.workflows, "study", stand_in, raising=False)
    return settings


@pytest.mark.parametrize(
    "words",
    [
        ("--log-format", "json", "tune", "--resume", "."),
        ("tune", "--log-format=json", "--resume", "."),
        ("tune", "--resume", ".", "--log-format", "json"),
    ],
)
def test_json_lines_on_stderr_and_results_on_stdout(
    monkeypatch: pytest.MonkeyPatch, study: SimpleNamespace, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert run(monkeypatch, *words) == 0
    out, err = capsys.readouterr()
    assert out == "\nDice 0.9\nreport: report.html\nbundle: bundle\n"
    rows = [json.loads(line) for line in err.splitlines()]
    assert [row["event"] for row in rows] == ["run-started", "stage", "halved", "progress", "run-ended"]
    assert {row["run"] for row in rows} == {"seg"}


def test_text_shows_the_view_and_warnings(
    monkeypatch: pytest.MonkeyPatch, study: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "tune", "--resume", ".") == 0
    out, err = capsys.readouterr()
    assert "[0:01] searching" in out and err == "warning: halved\nchecking: 3 of 3\n"
    assert "stage" in (study.folder / "log.jsonl").read_text()  # the file is written all the same


def test_the_environment_gives_what_the_line_leaves_open(
    monkeypatch: pytest.MonkeyPatch, study: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDRAY_LOG_FORMAT", "json")
    monkeypatch.setenv("MEDRAY_LOG_LEVEL", "debug")
    assert run(monkeypatch, "tune", "--resume", ".") == 0
    assert "fine" in [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert run(monkeypatch, "tune", "--resume", ".", "--log-level", "warning") == 0
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["halved"]


def test_errors_are_json_too(
    monkeypatch: pytest.MonkeyPatch, study: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    study.error = StudyError("the cluster is away")
    assert run(monkeypatch, "tune", "--resume", ".", "--log-format", "json") == 2
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["event"], last["level"], last["error"], last["text"]) == (
        "error", "error", "StudyError", "the cluster is away",
    )  # fmt: skip
    study.error = ZeroDivisionError("oh")
    assert run(monkeypatch, "tune", "--resume", ".", "--log-format", "json") == 1
    last = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (last["event"], last["level"]) == ("crash", "critical") and "ZeroDivisionError: oh" in last["exception"]
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "tune", "--resume", ".")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--log-format", "xml", "models"), "--log-format xml: choose from text, json"),
        (("models", "--log-level=loud"), "--log-level loud: choose from debug"),
        (("models", "--log-format"), "--log-format : choose from text, json"),
    ],
)
def test_a_wrong_value_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err
