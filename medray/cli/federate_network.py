"""``medray federate provision | server | site | run | status | stop``: a federation over a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medray.cli.arguments import split_arguments
from medray.cli.show import say, table

Folder = Annotated[Path, typer.Argument(help="Of the federation, as provision made it: federations/NAME")]


def add_to(app: typer.Typer) -> None:
    """Register these verbs."""
    for verb in (provision, server, site, run, status, stop):
        app.command(verb.__name__)(verb)


def provision(
    sites: Annotated[Path, typer.Argument(help="sites.yaml: the federation's name, its server, its sites.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder [default: federations/NAME]")] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="A site, or server, that gets new keys; may be given several times.")
    ] = None,
) -> None:
    """Make keys, certificates and a start-up kit for each site.

    Example: medray federate provision sites.yaml
    """
    from medray.workflows.federation.provisioning import provision as make

    made = make(sites, out=out, renew=renew or ())
    if made.server_renewed:
        say(f"server: {made.directory / 'server'} (move it to the server; {made.directory / 'authority'} stays away)")
    for name, kit in made.kits.items():
        say(f"kit of {name}: {kit} (hand it over by a safe way, then delete it: it holds the only copy of its key)")
    for name in made.removed:
        say(f"{name}: no longer let in, once the server is started again")
    if not (made.kits or made.removed or made.server_renewed):
        say(f"{made.directory}: all is there already; --renew NAME makes new keys")


def server(
    federation: Folder,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "0.0.0.0",
    port: Annotated[int | None, typer.Option(help="For the sites [default: the one of sites.yaml]")] = None,
    admin_port: Annotated[int, typer.Option(help="On loopback, for run, status and stop.")] = 9444,
) -> None:
    """Run a federation's server until it is stopped; what it knows survives a restart.

    Example: medray federate server federations/hearts
    """
    from medray.workflows.federation.network import serve_federation

    serve_federation(federation, host=host, port=port, admin_port=admin_port, told=say)


def site(
    rules: Annotated[Path, typer.Argument(help="site.yaml of the start-up kit.")] = Path("site.yaml"),
    check: Annotated[bool, typer.Option("--check", help="Try everything, send nothing.")] = False,
) -> None:
    """Take part in a federation, by this site's own rules; images never leave.

    Example: medray federate site site.yaml --check
    """
    from medray.workflows.federation.attending import attend_federation

    attend_federation(rules, check_only=check, told=say)


def run(
    federation: Folder,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT] [OVERRIDES]...", help="experiment.yaml, then fields."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME-run]")] = None,
    fingerprint: Annotated[
        Path | None,
        typer.Option(
            help="fingerprint.json of public or synthetic data, to plan with; without it the sites are asked."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on at the round that a run in --out lost.")] = False,
) -> None:
    """Start a run, on the machine of the federation's server; it goes on without this command.

    Example: medray federate run federations/hearts federation.rounds=50 --fingerprint runs/phantom/fingerprint.json
    """
    from medray.workflows.federation.leading import run_federation

    path, overrides = split_arguments(arguments or [])
    out = out or Path("runs") / f"{federation.absolute().name}-run"
    asked = run_federation(federation, path, overrides, out=out, fingerprint=fingerprint, resume=resume)
    say(f"run {asked.number} has started: follow it by tail -f {asked.directory / 'run.log'}")
    if asked.recipe:
        say(f"recipe {asked.recipe} (what sites may put under allow.recipes)")


def status(federation: Folder) -> None:
    """Who is there, and what runs; on the server's machine.

    Example: medray federate status federations/hearts
    """
    from medray.workflows.federation.network import status as ask

    found = ask(federation)
    table(("site", "status", "since"), [(row.name, row.status, row.since) for row in found.sites])
    rows = [(row.number, row.status, f"{row.seconds:.0f} s", f"{row.bytes / 2**20:.1f} MiB") for row in found.runs]
    say()
    table(("run", "status", "time", "over the wire"), rows)


def stop(federation: Folder, run: Annotated[str, typer.Argument(help="Its number, as status shows it.")]) -> None:
    """Stop a run; its rounds so far stay, and run --resume goes on.

    Example: medray federate stop federations/hearts 7225484268564870270
    """
    from medray.workflows.federation.network import stop_run

    stop_run(federation, run)
    say(f"run {run} is stopped")
