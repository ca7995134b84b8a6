"""``medray explain``: where a bundle looked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import say


def explain(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, DICOM series folders, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the maps go.")] = Path("explanations"),
    method: Annotated[Literal["gradcam", "gradcam++"], typer.Option(help="How.")] = "gradcam",
    target: Annotated[str | None, typer.Option(help="A class, by name or number [default: the answer itself]")] = None,
) -> None:
    """Show where the network looked: a picture under its heat; of a volume three slices, and the map as NIfTI.

    Exits with 1 where an image could not be explained.
    """
    from medray.workflows.explanation import explain_files

    found = explain_files(bundle, inputs, out, method=method, target=target)
    for item in found:
        if item.explanation is None:
            say(f"{item.image}: failed: {item.error}")
        else:
            say(f"{item.image}: {item.explanation.target_name} -> {', '.join(str(path) for path in item.outputs)}")
    say("A map shows what the answer rests on; it is no proof that the answer is right.")
    if any(item.error for item in found):
        raise typer.Exit(1)
