"""``medray doctor``: what this machine can do, and what it lacks."""

from __future__ import annotations

import typer

from medray.cli.show import say, table


def doctor() -> None:
    """Say what this machine can do, and what is missing, with the command that installs it.

    Exits with 1 where something that medray needs is missing or doesn't fit.
    """
    from medray.workflows.doctor import examine

    found = examine()
    table(("machine", ""), [(fact.name, fact.value) for fact in found.facts])
    say()
    table(
        ("library", "version", "for", "state"),
        [(item.name, item.version or "-", item.purpose, item.problem or "ok") for item in found.libraries],
    )
    missing = [item for item in found.libraries if item.problem]
    if missing:
        say()
        for item in missing:
            say(f"{'needed' if item.needed else 'optional'}: {item.install}")
    if any(item.needed for item in missing):
        raise typer.Exit(1)
    say("\nready")
