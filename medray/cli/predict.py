"""``medray predict``: a bundle on new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import progress, say


def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    inputs: Annotated[list[str], typer.Argument(help="Images, DICOM series folders, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the answers go.")] = Path("predictions"),
    runtime: Annotated[
        Literal["auto", "torch", "onnx", "openvino", "tensorrt"],
        typer.Option(help="What computes; all answer alike. auto: the fastest here, measured once."),
    ] = "onnx",
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"] | None,
        typer.Option(help="Of the arithmetic [default: the bundle's own; with auto, the fastest that agrees]"),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    overlays: Annotated[bool, typer.Option("--overlays", help="Draw the masks of pictures on them as well.")] = False,
) -> None:
    """Predict: NIfTI in, NIfTI out; DICOM in, DICOM-SEG out; pictures in, masks or a table of probabilities out.

    Exits with 1 where an image has no answer; the others have theirs.
    """
    from medray.workflows.prediction import predict_files

    with progress("predicting") as show:
        summary = predict_files(
            bundle, inputs, out, runtime, device=device, precision=precision, overlays=overlays, progress=show
        )
    say(f"engine: {summary.selection.shown}")
    for answer in summary.answers:
        if answer.error is not None:
            say(f"{answer.image}: failed: {answer.error}")
        elif answer.probabilities:
            likely = ", ".join(f"{name} {value:.3f}" for name, value in answer.probabilities.items())
            say(f"{answer.image}: {' + '.join(answer.classes) or 'none'} ({likely})")
        else:
            say(f"{answer.image} -> {answer.output}")
    say(f"{len(summary.answers) - len(summary.failed)} of {len(summary.answers)} answered, in {summary.directory}")
    say(summary.intended_use)
    if summary.exit_code:
        raise typer.Exit(summary.exit_code)
