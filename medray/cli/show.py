"""Printing: tables and progress that are pretty in a terminal and plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[int, int, str], None]
"""(done, all, what was done last)"""


def say(text: str = "") -> None:
    """A line on stdout, as it is: no markup, no wrapping."""
    print(text, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: drawn in a terminal, aligned columns without wrapping elsewhere (for grep and awk)."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]
    for row in [columns, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A function of (done, all, name) that shows how far something is, on stderr."""
    from medray import logs

    if sys.stderr.isatty() and not logs.is_json():
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        with Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bars:
            task = bars.add_task(what, total=None)
            yield lambda done, total, _name: bars.update(task, completed=done, total=total)
        return

    last = time.monotonic()

    def line(done: int, total: int, _name: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            if logs.is_json():
                logs.event("progress", text=what, done=done, total=total)
                return
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    yield line


def run_folder(source: str) -> Path:
    """The folder under ``runs/`` for a data source: named like it."""
    name = re.sub(r"^phantom://", "", source).partition("?")[0].rstrip("/")
    stem = Path(name).name
    for suffix in (".npz", ".csv", ".parquet", ".json", ".yaml"):
        stem = stem.removesuffix(suffix)
    return Path("runs") / (re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "data")


def duration(seconds: float) -> str:
    """``75`` to ``1:15``, ``3700`` to ``1:01:40``."""
    whole = round(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def interval(value: float, low: float, high: float) -> str:
    """``0.8123 [0.79, 0.83]``; the value alone where there is no interval."""
    return f"{value:.4g}" if math.isnan(low) or math.isnan(high) else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def figures(metrics: dict[str, float] | None) -> str:
    """``{"val/dice": 0.81234}`` to ``val/dice 0.8123``."""
    return "  ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
