"""``medray data``: phantoms, and named public sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medray.cli.show import progress, say, table

app = typer.Typer(no_args_is_help=True, help="List, write and fetch data sets.")


@app.command("list")
def list_() -> None:
    """Show the phantoms and the public sets that have a name here."""
    from medray.data.download import DATASETS
    from medray.data.phantoms import PHANTOMS

    table(
        ("phantom", "what it is"), [(f"phantom://{name}", spec.description) for name, spec in sorted(PHANTOMS.items())]
    )
    say()
    table(("public set", "what it is"), [(name, dataset.description) for name, dataset in sorted(DATASETS.items())])


@app.command()
def phantom(
    name: Annotated[str, typer.Argument(help="See: medray data list")],
    directory: Annotated[Path, typer.Argument(help="Folder to write to.")],
    cases: Annotated[int, typer.Option(min=1, help="How many.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=8, help="Pixels along the longest axis [default: the phantom's own]")
    ] = None,
) -> None:
    """Write a phantom as files: NIfTI or PNG, and a table."""
    from medray.data.phantoms import write_phantom

    written = write_phantom(name.removeprefix("phantom://"), directory, cases=cases, seed=seed, size=size)
    say(f"{cases} cases in {written or directory}")


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="See: medray data list")],
    directory: Annotated[Path, typer.Argument(help="Folder to write to.")] = Path("data"),
) -> None:
    """Fetch a public set; a broken download goes on where it stopped, and its hash is checked."""
    from medray.data.download import fetch

    with progress(f"fetching {name}") as show:
        path = fetch(name, directory, progress=show)
    say(f"{path}")
    say(f"next: medray check {path}")
