"""``medray runs``: what has been run, and what is running."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medray.cli.show import duration, say, table

if TYPE_CHECKING:
    from medray.workflows.runs import RunInfo


def runs(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="The folder in which runs lie, or that of one run.")
    ] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")] = False,
) -> None:
    """List runs and their state: running, ended, stopped (may be resumed), failed, damaged.

    Only reads: a run that is going on does not notice.

    Example: medray runs --json
    """
    from medray.workflows.runs import list_runs

    found = list_runs(directory)
    if as_json:
        say(json.dumps([_plain(run) for run in found], indent=1, allow_nan=False))
        return
    if not found:
        say(f"no runs in {directory}")
        return
    table(("run", "kind", "state", "best", "time", "trials", "changed", ""), [_row(run) for run in found])


def _row(run: RunInfo) -> tuple[str, ...]:
    spent = "" if run.spent is None else duration(run.spent) + (f"/{duration(run.budget)}" if run.budget else "")
    trials = ", ".join(f"{number} {state}" for state, number in run.trials.items() if number)
    changed = "" if run.changed is None else f"{dt.datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}"
    best = "" if run.best is None else f"{run.metric or ''} {run.best:.4g}".strip()
    return run.name, run.kind, run.state, best, spent, trials, changed, run.text


def _plain(run: RunInfo) -> dict[str, Any]:
    changed = None if run.changed is None else dt.datetime.fromtimestamp(run.changed, dt.UTC).isoformat()
    return {
        "run": run.name,
        "directory": str(run.directory),
        "kind": run.kind,
        "state": run.state,
        "metric": run.metric,
        "best": run.best,
        "spent": run.spent,
        "budget": run.budget,
        "trials": dict(run.trials),
        "changed": changed,
        "text": run.text,
    }
