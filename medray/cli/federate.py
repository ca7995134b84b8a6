"""``medray federate``: hospitals that train together."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.arguments import split_arguments
from medray.cli.live import watch
from medray.cli.show import run_folder, say

app = typer.Typer(help="Train one model over several hospitals whose data stay where they are.", no_args_is_help=True)


@app.command("simulate")
def simulate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT] [OVERRIDES]...",
            help="experiment.yaml, then fields such as data=scans/ federation.strategy=fedprox",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME-federation]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on at the round that a run in --out lost.")] = False,
    engine: Annotated[
        Literal["auto", "here", "ray"],
        typer.Option(help="Where sites work: here, one after the other, or several at once on Ray."),
    ] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Also train each site alone, and all data together.")
    ] = True,
    address: Annotated[str | None, typer.Option(help="host:port of a Ray cluster for the sites.")] = None,
) -> None:
    """Try a federation on data that lie here: sites by the data's own column, or dealt out.

    Example: medray federate simulate data=phantom://xray-nodules federation.rounds=20 federation.strategy=fedprox
    """
    path, overrides = split_arguments(arguments or [])
    from medray.workflows.federation.simulate import simulate_federation

    if out is None:
        data = [text.partition("=")[2] for text in overrides if text.startswith("data=")]
        folder = run_folder(data[-1] if data else path.stem if path is not None else "default")
        out = folder.with_name(f"{folder.name}-federation")
    words = ["medray", "federate", "simulate", *([str(path)] if path else []), *overrides]
    with watch(f"federation in {out}") as view:
        result = simulate_federation(
            path,
            overrides,
            out=out,
            resume=resume,
            engine=engine,
            compare=compare,
            address=address,
            command=shlex.join(words),
            observer=view,
        )
    say()
    say(result.headline)
    say(f"report: {result.report}")
    for bundle in result.bundles:
        say(f"bundle: {bundle}")
