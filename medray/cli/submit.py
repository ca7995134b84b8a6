"""``medray submit``: a command on a Ray cluster, as a job that outlives this terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from medray.cli.show import say
from medray.errors import ConfigError

if TYPE_CHECKING:
    from medray.engines.ray.jobs import JobState

_NOT_FOUND = 127  # a shell's exit code


def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- VERB [ARGUMENTS]...", help="A command of medray, such as: -- tune seg.yaml data=/x"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The head's dashboard [default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265]"),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what the job prints, to its end.")] = False,
    folder: Annotated[
        str | None,
        typer.Option(help="Folder on the cluster that all its machines see [default: MEDRAY_SHARED there, or home]"),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Kept for the command itself; 0 runs it on the head.")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="Likewise; 'train' with one worker needs 1.")] = 0,
    status: Annotated[str | None, typer.Option(metavar="ID", help="Say how this job stands.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="ID", help="Print its logs; with --follow, to its end.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop it, as by Ctrl-C.")] = None,
) -> None:
    """Run a command of medray on a Ray cluster; returns at once with the job's id.

    The YAML file that the command names travels along. Data doesn't: paths are the cluster's.

    Example: medray submit --address http://HEAD:8265 --follow -- tune search_spaces/seg.yaml data=/mnt/medray/scans
    """
    if sum(map(bool, (command, status, logs, stop))) != 1:
        raise ConfigError("submit takes one of: a command after two dashes, --status ID, --logs ID, --stop ID")
    from medray.engines.ray import jobs

    if status:
        _tell(jobs.state(status, address=address))
    elif stop:
        was_running = jobs.stop(stop, address=address)
        say(f"{stop}: {'asked to stop' if was_running else 'had ended already'}")
    elif logs and not follow:
        _write(jobs.logs(logs, address=address))
    elif logs:
        _follow(logs, address)
    else:
        identity = jobs.submit(command or [], address=address, folder=folder, cpus=cpus, gpus=gpus)
        say(identity)
        if follow:
            _follow(identity, address)
        else:
            _hint(f"follow it: {_command(address)} --logs {identity} --follow")


def _follow(identity: str, address: str | None) -> None:
    from medray.engines.ray import jobs

    try:
        end = jobs.follow(identity, _write, address=address)
    except KeyboardInterrupt:
        _hint(f"\n{identity} runs on. Follow it again: {_command(address)} --logs {identity} --follow")
        raise
    if end.status == "SUCCEEDED":
        return
    if end.exit_code == _NOT_FOUND:
        _hint("medray is not on the PATH that 'ray start' had on the cluster: see docs/cluster.md")
    _hint(_line(end))
    raise typer.Exit(end.exit_code or 1)


def _tell(found: JobState) -> None:
    say(_line(found))


def _line(found: JobState) -> str:
    code = f" (exit code {found.exit_code})" if found.exit_code is not None else ""
    return f"{found.id}: {found.status}{code}" + (f". {found.message}" if found.message else "")


def _command(address: str | None) -> str:
    return f"medray submit --address {address}" if address else "medray submit"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _hint(text: str) -> None:
    """On stderr: stdout is the job's id and what the job prints."""
    print(text, file=sys.stderr, flush=True)
