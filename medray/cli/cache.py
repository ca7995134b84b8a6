"""``medray cache``: the prepared cases that lie on this machine."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer

from medray.cli.show import say, table


def cache(
    directory: Annotated[Path, typer.Option("--dir", help="Folder of the cache.")] = Path("runs/.cache"),
    clear: Annotated[bool, typer.Option("--clear", help="Remove what no process has open.")] = False,
) -> None:
    """List the prepared cases, and how much of the disk they take; they are made anew where they are missing.

    The folder is kept under MEDRAY_CACHE_LIMIT (such as 50GB; by default half of what the disk has for it): what was
    used longest ago goes first.

    Example: medray cache --clear
    """
    from medray.data import shelf

    if clear:
        removed = shelf.trim(directory, 0)
        say(f"removed {len(removed)}, {sum(entry.size for entry in removed) / 1e9:.2f} GB")
    found = shelf.entries(directory)
    rows = [
        (
            entry.source,
            f"{entry.size / 1e9:.2f} GB",
            f"{dt.datetime.fromtimestamp(entry.used):%Y-%m-%d %H:%M}",
            "in use" if entry.in_use else "",
        )
        for entry in found
    ]
    if rows:
        table(("prepared from", "size", "last used", ""), rows)
    total = sum(entry.size for entry in found) / 1e9
    say(f"{total:.2f} GB of at most {shelf.limit(directory) / 1e9:.0f} GB in {directory}")
