"""The verbs: what they hand to the workflows, what they print, and how they end."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from medray.cli.arguments import split_arguments
from medray.cli.main import app, main
from medray.cli.show import duration, run_folder, table
from medray.config.spaces import shipped
from medray.data.manifest import Case, Finding, Manifest
from medray.errors import ConfigError, StudyError


class Calls:
    """A fake workflow module: records what its functions are given, and answers as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def fake(self, module: str, name: str, answer: Any) -> None:
        def function(*arguments: Any, **keywords: Any) -> Any:
            self.seen.append((arguments, keywords))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        stand_in = ModuleType(module)
        setattr(stand_in, name, function)
        self._monkeypatch.setitem(sys.modules, module, stand_in)
        package, _, leaf = module.rpartition(".")
        if package in sys.modules:
            self._monkeypatch.setattr(sys.modules[package], leaf, stand_in, raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    import medray.workflows  # noqa: F401  (so that its attribute is replaced as well)

    return Calls(monkeypatch)


def study_result() -> SimpleNamespace:
    return SimpleNamespace(headline="Dice 0.9", report=Path("runs/seg/report.html"), bundle=Path("runs/seg/bundle"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medray", *arguments])
    try:
        main()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    return 0


def test_tune_hands_over_and_says_where_things_lie(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "seg.yaml"
    space.write_text("space: {}\n")
    calls.fake("medray.workflows.study", "tune", study_result())
    overrides = ["data=/scans/~x (1)", "~space.optim.lr", "+a.b=1", "study.objectives.val/dice=max"]
    assert run(monkeypatch, "tune", str(space), *overrides, "--address", "auto") == 0
    ((arguments, keywords),) = calls.seen
    assert arguments == (space, overrides)
    assert keywords["address"] == "auto" and keywords["resume"] is None and callable(keywords["observer"])
    out = capsys.readouterr().out
    assert "Dice 0.9" in out and "report: runs/seg/report.html" in out and "bundle: runs/seg/bundle" in out


@pytest.mark.parametrize("words", [["seg3d"], []])
def test_tune_finds_a_shipped_space_by_its_name_or_by_the_data(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, words: list[str]
) -> None:
    calls.fake("medray.workflows.study", "tune", study_result())
    assert run(monkeypatch, "tune", *words, "data=phantom://ct-lesions?cases=4&size=16") == 0
    assert calls.seen[0][0][0] == shipped("seg3d")


def test_tune_resumes_with_overrides(monkeypatch: pytest.MonkeyPatch, calls: Calls, tmp_path: Path) -> None:
    calls.fake("medray.workflows.study", "tune", study_result())
    assert run(monkeypatch, "tune", "--resume", str(tmp_path), "study.budget=1h") == 0
    assert calls.seen[0][0] == (None, ["study.budget=1h"]) and calls.seen[0][1]["resume"] == str(tmp_path)


def test_train_takes_overrides_alone(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = SimpleNamespace(headline="val/dice 0.8", directory=Path("runs/x"), privacy=())
    calls.fake("medray.workflows.training", "train_experiment", answer)
    assert run(monkeypatch, "train", "data=phantom://ct-lesions?size=16", "optim.lr=1e-3") == 0
    arguments, keywords = calls.seen[0]
    assert arguments == (None, ["data=phantom://ct-lesions?size=16", "optim.lr=1e-3"])
    assert keywords["out"] == Path("runs/ct-lesions-train") and keywords["resume"] is False
    assert "val/dice 0.8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("severity", "options", "code"),
    [("warning", [], 0), ("error", [], 1), ("warning", ["--strict"], 1)],
)
def test_check_prints_findings_and_exits_with_1_on_errors(
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    severity: Any,
    options: list[str],
    code: int,
) -> None:
    found = [
        Finding(rule="constant", severity=severity, case=f"c{n}", message="all 0", fix="remove it") for n in range(12)
    ]
    manifest = Manifest(
        source="x", root=".", task="segmentation", ndim=2, channels=1, classes=("background", "lesion"),
        cases=(Case(id="c0", images=("a.png",), patient="p"), Case(id="c1", images=("b.png",), patient="p")),
        findings=tuple(found),
    )  # fmt: skip
    calls.fake("medray.workflows.check", "check_data", manifest)
    assert run(monkeypatch, "check", "scans/brain MR/", *options) == code
    assert calls.seen[0][0] == ("scans/brain MR/", Path("runs/brain-MR/manifest.json"))
    out = capsys.readouterr().out
    assert "2 cases of 1 patients" in out and "remove it" in out and "... and 2 more" in out
    assert f"{severity}: constant (12)" in out and "manifest: runs/brain-MR/manifest.json" in out


def test_plan_reads_a_duration(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    calls.fake("medray.workflows.planning", "plan_data", Path("runs/a/experiment.yaml"))
    assert run(monkeypatch, "plan", "a", "--budget", "20min") == 0
    assert calls.seen == [(("a", Path("runs/a")), {"task": "auto", "budget": 1200.0})]
    assert run(monkeypatch, "plan", "a", "--budget", "soon") == 2


def test_predict_and_evaluate_hand_over(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    from medray.learn.intervals import Interval

    answers = (
        SimpleNamespace(image="a.nii.gz", output="out/a_seg.nii.gz", error=None, probabilities=None, classes=()),
        SimpleNamespace(image="b.png", output=None, error=None, probabilities={"sick": 0.91}, classes=("sick",)),
        SimpleNamespace(image="c.dcm", output=None, error="truncated", probabilities=None, classes=()),
    )
    summary = SimpleNamespace(
        selection=SimpleNamespace(shown="onnx fp32"),
        answers=answers,
        failed=answers[2:],
        directory=Path("out"),
        intended_use="Research use only.",
        exit_code=1,
    )
    calls.fake("medray.workflows.prediction", "predict_files", summary)
    assert run(monkeypatch, "predict", "b", "a.nii.gz", "c.dcm", "-o", "out", "--runtime", "torch") == 1
    assert calls.seen[0][0] == (Path("b"), ["a.nii.gz", "c.dcm"], Path("out"), "torch")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "engine: onnx fp32",
        "a.nii.gz -> out/a_seg.nii.gz",
        "b.png: sick (sick 0.910)",
        "c.dcm: failed: truncated",
        "2 of 3 answered, in out",
        "Research use only.",
    ]

    comparison = SimpleNamespace(
        other_metrics={"dice": Interval(0.6, 0.5, 0.7)}, difference={"dice": Interval(0.1, 0.05, 0.15)}
    )
    found = SimpleNamespace(
        cases=9, patients=8, split="test", metrics={"dice": Interval(0.7, 0.6, 0.8)}, comparison=comparison,
        failed=[("x", "no mask")], notes=("few cases",), intended_use="Research use only.",
    )  # fmt: skip
    calls.fake("medray.workflows.evaluation", "evaluate", found)
    assert run(monkeypatch, "evaluate", "b", "data/", "--compare", "b2") == 0
    arguments, keywords = calls.seen[1]
    assert arguments == (Path("b"), "data/") and keywords["compare"] == Path("b2") and keywords["split"] == "auto"
    out = capsys.readouterr().out
    assert "dice    0.7 [0.6, 0.8]  0.6 [0.5, 0.7]  0.1 [0.05, 0.15]" in out and "x: not scored: no mask" in out


def test_an_error_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.fake("medray.workflows.study", "tune", StudyError("the cluster [auto] is away"))
    assert run(monkeypatch, "tune", "--resume", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the cluster [auto] is away\n" and "Traceback" not in captured.out
    with pytest.raises(StudyError):
        run(monkeypatch, "tune", "--resume", str(tmp_path), "--debug")


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, calls: Calls, tmp_path: Path) -> None:
    calls.fake("medray.workflows.study", "tune", KeyboardInterrupt())
    assert run(monkeypatch, "tune", "--resume", str(tmp_path)) == 130


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune"], "needs data"),
        (["tune", "seg33", "data=x"], "seg3d"),
        (["tune", "none.yaml"], "none.yaml: no such file"),
        (["tune", "--resume", "nowhere"], "--resume nowhere: no such folder"),
        (["train", "data=x", "word"], "'word' is no override"),
    ],
)
def test_wrong_arguments_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err


def test_a_file_is_told_from_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path("a=b.yaml")
    odd.write_text("")
    assert split_arguments(["a=b.yaml", "optim.lr=1"]) == (odd, ["optim.lr=1"])
    assert split_arguments(["optim.lr=1"]) == (None, ["optim.lr=1"])
    assert split_arguments([]) == (None, [])
    with pytest.raises(ConfigError, match="no such file"):
        split_arguments(["missing.yaml"])


def test_every_verb_has_a_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = [command.name for command in app.registered_commands]
    assert {"check", "plan", "models", "train", "tune", "predict", "evaluate", "runs", "cache", "doctor"} <= set(names)
    for words in ([], *([name] for name in names), ["data"], ["data", "list"], ["data", "phantom"], ["data", "get"]):
        assert run(monkeypatch, *words, "--help") == 0
        assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("phantom://ct-lesions?seed=1", "ct-lesions"),
        ("/data/Task04_Hippocampus/", "Task04_Hippocampus"),
        ("x/pneumoniamnist.npz", "pneumoniamnist"),
        ("../Ärzte (neu)", "Ärzte-neu"),
        ("..", "data"),
    ],
)
def test_run_folder_is_named_like_the_data(source: str, folder: str) -> None:
    assert run_folder(source) == Path("runs") / folder


def test_tables_and_times_are_plain_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table(("a", "long"), [("xxx", "y" * 200), ("z", "")])
    assert capsys.readouterr().out.splitlines() == ["a    long", f"xxx  {'y' * 200}", "z"]
    assert [duration(s) for s in (-1, 0, 75, 3700)] == ["0:00", "0:00", "1:15", "1:01:40"]
