"""``medray evaluate``: how good a bundle is on labelled data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import interval, progress, say, table


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    data: Annotated[str, typer.Argument(help="Labelled data, in any layout that check reads.")],
    compare: Annotated[Path | None, typer.Option(help="A second bundle, compared case by case.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the figures and the cases' table.")
    ] = None,
    split: Annotated[
        Literal["auto", "all", "train", "val", "test"], typer.Option(help="Which cases; auto: the test ones if marked.")
    ] = "auto",
    runtime: Annotated[
        Literal["auto", "torch", "onnx", "openvino", "tensorrt"], typer.Option(help="What computes.")
    ] = "onnx",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
) -> None:
    """Score a bundle on any labelled data, with 95 % intervals over patients; with --compare, two of them pairwise."""
    from medray.workflows.evaluation import evaluate as score

    with progress("evaluating") as show:
        found = score(
            bundle, data, runtime=runtime, device=device, compare=compare, split=split, out=out, progress=show
        )
    say(f"{found.cases} cases of {found.patients} patients ({found.split}); 95 % intervals over patients")
    other = found.comparison
    columns = ["figure", "value", *(["the other", "difference"] if other else [])]
    rows = []
    for name, value in found.metrics.items():
        row = [name, interval(*value)]
        if other:
            pair = (other.other_metrics.get(name), other.difference.get(name))
            row += [interval(*cell) if cell else "" for cell in pair]
        rows.append(row)
    table(columns, rows)
    for case, reason in found.failed:
        say(f"{case}: not scored: {reason}")
    for note in found.notes:
        say(note)
    say(found.intended_use)
    if out is not None:
        say(f"figures: {out}")
