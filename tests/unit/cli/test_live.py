"""The view of a running study: plain lines, and the live table."""

from __future__ import annotations

import pytest

from medray.cli.live import LiveView
from medray.workflows.events import StudyEvent

EVENTS = [
    StudyEvent(kind="stage", text="searching", elapsed=1, budget=180),
    StudyEvent(kind="trial-started", trial=0, text="the plan", elapsed=2),
    StudyEvent(kind="trial-progress", trial=0, fraction=0.25, metrics={"val/dice": 0.5}, elapsed=10),
    StudyEvent(kind="trial-completed", trial=0, metrics={"val/dice": 0.8123}, best=0.8123, elapsed=30),
    StudyEvent(kind="trial-started", trial=1, elapsed=31),
    StudyEvent(kind="trial-pruned", trial=1, metrics={"val/dice": 0.1}, elapsed=40, expected_gain=0.013),
    StudyEvent(kind="trial-started", trial=2, elapsed=41),
    StudyEvent(kind="trial-failed", trial=2, text="Traceback ...\nNonFiniteLossError: step 7", elapsed=45),
    StudyEvent(kind="trial-started", trial=3, elapsed=46),
    StudyEvent(kind="note", text="[1, 2] is no markup", elapsed=47),
]


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("demo", terminal=False) as view:
        for event in EVENTS:
            view(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[0:01/3:00] searching"
    assert lines[1] == "[0:02/3:00] trial 0 running: the plan"
    assert (
        "[0:30/3:00] trial 0 completed: the plan, val/dice 0.8123, best 0.8123" not in lines
    )  # text is the event's own
    assert "[0:30/3:00] trial 0 completed: val/dice 0.8123, best 0.8123" in lines
    assert "[0:40/3:00] trial 1 pruned: val/dice 0.1" in lines
    assert any("NonFiniteLossError: step 7" in line for line in lines)
    assert lines[-1] == "[0:47/3:00] [1, 2] is no markup"
    assert "[0:10/3:00] trial 0 running 25%: val/dice 0.5" in lines


def test_a_trial_that_merely_gets_on_is_told_every_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("demo", terminal=False) as view:
        for step in range(100):
            view(StudyEvent(kind="trial-progress", trial=0, fraction=step / 100))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_live_table() -> None:
    from rich.console import Console

    view = LiveView("study demo", terminal=True)
    for event in EVENTS:
        view._take(event)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(view._render())
    text = console.export_text()
    assert "study demo  searching" in text
    assert "best so far 0.8123" in text and "budget left 2:1" in text and "expected gain +0.013" in text
    assert "1 running, 1 completed, 1 pruned, 1 failed" in text
    assert "NonFiniteLossError: step 7" in text and "Traceback" not in text  # the row shows the error's last line
    assert "[1, 2] is no markup" in text


def test_many_trials_show_the_running_and_the_latest() -> None:
    from rich.console import Console

    view = LiveView("study", terminal=True)
    for number in range(40):
        view._take(StudyEvent(kind="trial-started", trial=number))
        if number:
            view._take(StudyEvent(kind="trial-completed", trial=number, metrics={"val/dice": number / 100}))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(view._render())
    rows = [line.split()[:2] for line in console.export_text().splitlines()]
    assert ["0", "running"] in rows and ["39", "completed"] in rows and ["1", "completed"] not in rows
    assert sum(row[1:] in (["running"], ["completed"]) for row in rows) == 12


def test_the_terminal_view_starts_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("study demo", terminal=True) as view:
        for event in EVENTS:
            view(event)
    assert "expected gain" in capsys.readouterr().out
