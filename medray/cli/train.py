"""``medray train``: one experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medray.cli.arguments import split_arguments
from medray.cli.live import watch
from medray.cli.show import run_folder, say


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT] [OVERRIDES]...", help="experiment.yaml, then fields such as optim.lr=1e-3"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME-train]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in --out stopped.")] = False,
    address: Annotated[
        str | None, typer.Option(help="host:port of a Ray cluster to train on, with train.workers=N")
    ] = None,
) -> None:
    """Train one experiment; what it doesn't say is planned for the data and this machine.

    Example: medray train data=scans/ model.name=segresnet train.budget=20min train.workers=4
    """
    path, overrides = split_arguments(arguments or [])
    from medray.workflows.training import train_experiment

    if out is None:
        out = _default_out(path, overrides)
    with watch(f"training in {out}") as view:
        result = train_experiment(path, overrides, out=out, resume=resume, address=address, observer=view)
    say(result.headline)
    for line in result.privacy:
        say(line)
    say(f"run: {result.directory}")


def _default_out(path: Path | None, overrides: list[str]) -> Path:
    """``runs/scans-train`` for ``data=scans/`` or ``runs/scans/experiment.yaml``."""
    data = [text.partition("=")[2] for text in overrides if text.startswith("data=")]
    if path is not None and not data:
        folder = run_folder(path.absolute().parent.name if path.stem == "experiment" else path.name)
    else:
        folder = run_folder(data[-1] if data else "default")
    return folder.with_name(f"{folder.name}-train")
