"""``medray keys``: who may ask a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medray.cli.show import say, table

app = typer.Typer(no_args_is_help=True, help="Add, list and revoke the API keys of a server.")
File = Annotated[Path, typer.Option("--file", "-f", help="The file of security.keys.")]
_DEFAULT = Path("keys.json")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who gets it, such as pacs; shown in the audit trail.")],
    file: File = _DEFAULT,
    scope: Annotated[
        list[str] | None, typer.Option(help="predict, explain, metrics or admin; again for more. [default: predict]")
    ] = None,
    per_minute: Annotated[int | None, typer.Option(min=1, help="Predictions that it may ask for a minute.")] = None,
    days: Annotated[int | None, typer.Option(min=1, help="After which it expires.")] = None,
) -> None:
    """Make a key and print it, this once: the file holds a hash of it. A running server knows it within a second."""
    from medray.workflows.serving import add_key

    say(add_key(file, name, scope or ["predict"], requests_per_minute=per_minute, days=days))


@app.command("list")
def list_(file: File = _DEFAULT) -> None:
    """Show who has which, without the keys."""
    from medray.workflows.serving import list_keys

    rows = [
        (key["id"], key["name"], " ".join(key["scopes"]), str(key["requests_per_minute"] or ""), key["expires"] or "")
        for key in list_keys(file)
    ]
    table(("id", "name", "scopes", "per minute", "expires"), rows)


@app.command()
def revoke(
    which: Annotated[str, typer.Argument(help="An id, or a name: all of its keys.")], file: File = _DEFAULT
) -> None:
    """Take keys back. A running server refuses them within a second."""
    from medray.workflows.serving import revoke_key

    say(f"{revoke_key(file, which)} revoked")
