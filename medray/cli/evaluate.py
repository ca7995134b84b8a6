"""``medray evaluate``: how good a bundle is on labelled data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import say


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    data: Annotated[str, typer.Argument(help="Labelled data, in any layout that check reads.")],
    compare: Annotated[Path | None, typer.Option(help="A second bundle, compared case by case.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the figures and the cases' table.")
    ] = None,
    runtime: Annotated[Literal["torch", "onnx"], typer.Option(help="What computes.")] = "onnx",
) -> None:
    """Score a bundle on any labelled data, with 95 % intervals over patients; with --compare, two of them pairwise."""
    from medray.workflows.evaluation import evaluate as score

    result = score(bundle, data, runtime=runtime, compare=compare, out=out)
    say(result.headline)
    if out is not None:
        say(f"figures: {out}")
