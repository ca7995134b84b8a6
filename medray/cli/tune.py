"""``medray tune``: a study."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from medray.cli.arguments import split_arguments
from medray.cli.live import watch
from medray.cli.show import say
from medray.errors import ConfigError


def tune(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPACE] [OVERRIDES]...",
            help="A search space: a file, or the name of one that comes with medray (cls, seg, seg3d, table); without "
            "one, what suits the data. Then fields such as data=scans/ study.budget=1h",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with the study in this folder, such as runs/seg, or in a store: s3://bucket/runs/seg."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster that this machine is part of: auto, HOST:PORT. Else: medray submit."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Keep the study in this store too, s3://bucket/runs; --resume goes on from it.")
    ] = None,
) -> None:
    """Search, fit the champion, report and bundle, within the budget.

    Example: medray tune seg data=scans/ study.budget=1h
    """
    started = time.time()  # the budget covers the imports too
    from medray.config.spaces import shipped

    path, overrides = split_arguments(arguments or [], shipped)
    if path is None and resume is None and not overrides:
        raise ConfigError("tune needs data, such as data=scans/ or phantom://ct-lesions, or --resume runs/NAME")
    if resume is not None and "://" not in resume and not Path(resume).is_dir():
        raise ConfigError(f"--resume {resume}: no such folder; it is a study's own, such as runs/seg")
    from medray.workflows.spaces import space_for
    from medray.workflows.study import tune as run_study

    if path is None and resume is None:
        path = space_for(overrides)
        say(f"the data suit the search space {path.stem!r}")
    with watch(f"study {Path(resume).name if resume else path.stem if path else ''}") as view:
        result = run_study(
            path, overrides, resume=resume, address=address, storage=storage, observer=view, started=started
        )
    say()
    say(result.headline)
    say(f"report: {result.report}")
    say(f"bundle: {result.bundle}")
