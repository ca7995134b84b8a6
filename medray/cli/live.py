"""What ``tune`` and ``train`` show while they run: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from medray.cli.show import duration, figures

if TYPE_CHECKING:
    from rich.console import RenderableType

    from medray.workflows.events import StudyEvent

ROWS = 12
"""Trials in the live table: those that run, then the latest."""

QUIET = 15.0
"""Seconds between plain lines about a trial that is merely getting on."""

_STATE = {
    "trial-started": "running",
    "trial-progress": "running",
    "trial-completed": "completed",
    "trial-pruned": "pruned",
    "trial-failed": "failed",
}
_STYLE = {"running": "cyan", "completed": "green", "pruned": "yellow", "failed": "red"}


@dataclass
class _Row:
    state: str = "running"
    fraction: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    text: str = ""


def watch(title: str) -> LiveView | Silent:
    """What shows a run to whoever started it; with ``--log-format json`` the log alone does."""
    from medray import logs

    return Silent() if logs.is_json() else LiveView(title)


class Silent:
    """A view that shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __call__(self, event: StudyEvent) -> None: ...


class LiveView:
    """An observer of a study or a run; use it as a context manager, and call it with each event (from any thread)."""

    def __init__(self, title: str, *, terminal: bool | None = None) -> None:
        self._title = title
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._lock = threading.Lock()
        self._rows: dict[int, _Row] = {}
        self._stage = ""
        self._notes: list[str] = []
        self._best: float | None = None
        self._gain: float | None = None
        self._budget: float | None = None
        self._elapsed, self._heard = 0.0, time.monotonic()
        self._said: dict[int, float] = {}
        self._live: Any = None

    def __enter__(self) -> LiveView:
        if self._terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._render, refresh_per_second=2, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.refresh()
            self._live.stop()

    def __call__(self, event: StudyEvent) -> None:
        with self._lock:
            self._take(event)
            if not self._terminal:
                self._plain(event)

    def _take(self, event: StudyEvent) -> None:
        if event.elapsed:
            self._elapsed, self._heard = event.elapsed, time.monotonic()
        self._best = event.best if event.best is not None else self._best
        self._budget = event.budget if event.budget is not None else self._budget
        self._gain = event.expected_gain if event.expected_gain is not None else self._gain
        if event.kind == "stage":
            self._stage = event.text
        elif event.kind in ("note", "done"):
            self._notes = [*self._notes, event.text][-4:]
        elif event.trial is not None:
            row = self._rows.setdefault(event.trial, _Row())
            row.state = _STATE[event.kind]
            row.fraction = event.fraction if event.fraction is not None else row.fraction
            row.metrics |= dict(event.metrics)
            row.text = event.text or row.text

    def _clock(self) -> float:
        return self._elapsed + (time.monotonic() - self._heard)

    def counts(self) -> dict[str, int]:
        """Trials by state."""
        found = dict.fromkeys(_STYLE, 0)
        for row in self._rows.values():
            found[row.state] += 1
        return found

    def _plain(self, event: StudyEvent) -> None:
        at = duration(self._clock()) + (f"/{duration(self._budget)}" if self._budget else "")
        if event.kind in ("stage", "note", "done"):
            if event.text:
                print(f"[{at}] {event.text}", flush=True)
            return
        number = event.trial or 0
        if event.kind == "trial-progress":
            now = time.monotonic()
            if now - self._said.get(number, now - QUIET) < QUIET:
                return
            self._said[number] = now
        state = _STATE[event.kind]
        parts = [f"trial {number} {state}"]
        if event.kind == "trial-progress" and event.fraction is not None:
            parts[0] += f" {event.fraction:.0%}"
        parts += [part for part in (event.text, figures(dict(event.metrics))) if part]
        if event.kind == "trial-completed" and self._best is not None:
            parts.append(f"best {self._best:.4g}")
        print(f"[{at}] " + ": ".join([parts[0], ", ".join(parts[1:])] if parts[1:] else parts), flush=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            now, counts = self._clock(), self.counts()
            head = Text(f"{self._title}", style="bold")
            head.append(f"  {self._stage}", style="dim")
            facts, trials = [], ""
            if self._best is not None:
                facts.append(f"best so far {self._best:.4g}")
            if self._budget:
                facts.append(f"budget left {duration(self._budget - now)} of {duration(self._budget)}")
            else:
                facts.append(f"time {duration(now)}")
            if self._gain is not None:
                facts.append(f"expected gain {self._gain:+.2g}")
            if len(self._rows) > 1 or self._budget:
                shown = [f"{count} {state}" for state, count in counts.items() if count or state == "running"]
                trials = "trials: " + ", ".join(shown)
            parts: list[RenderableType] = [head, Text("   ".join(facts)), *([Text(trials)] if trials else [])]
            if self._budget:
                # On its own, a bar ends without a line break, and what follows is cropped with it.
                parts.append(Padding(ProgressBar(total=self._budget, completed=min(now, self._budget)), 0))
            if self._rows:
                drawn = Table.grid("trial", "state", "", "figures", "", padding=(0, 2))
                drawn.show_header, drawn.header_style = True, "dim"
                for column in drawn.columns:
                    column.no_wrap = True
                running = [number for number, row in self._rows.items() if row.state == "running"]
                others = [number for number in self._rows if number not in running]
                room = max(0, ROWS - len(running))
                for number in sorted([*running[-ROWS:], *(others[-room:] if room else ())]):
                    row = self._rows[number]
                    bar = (
                        ProgressBar(total=1.0, completed=row.fraction, width=16)
                        if row.fraction is not None and row.state == "running"
                        else Text("")
                    )
                    last = row.text.splitlines()[-1] if row.text else ""
                    drawn.add_row(
                        str(number),
                        Text(row.state, style=_STYLE[row.state]),
                        bar,
                        figures(row.metrics),
                        Text(last, style="dim"),
                    )
                parts.append(drawn)
            parts += [Text(note) for note in self._notes]
            return Group(*parts)
