"""``medray predict``: a bundle on new images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import progress, say


def predict(
    bundle: Annotated[str, typer.Argument(help="A bundle's folder, such as runs/seg/bundle; left out with --server.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Images, DICOM series folders, or folders of them.")
    ] = None,
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
    server: Annotated[
        str | None, typer.Option(help="Ask this server (medray serve) instead; its key in MEDRAY_API_KEY.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of the server's; left out: its default.")] = None,
) -> None:
    """Predict: NIfTI in, NIfTI out; DICOM in, DICOM-SEG out; pictures in, masks or a table of probabilities out.

    Exits with 1 where an image has no answer; the others have theirs.
    """
    with progress("predicting") as show:
        if server is not None:
            from medray.workflows.client import ENVIRONMENT, predict_by_server

            key = os.environ.get(ENVIRONMENT)
            summary = predict_by_server(server, [bundle, *(inputs or [])], out, key=key, model=model, progress=show)
        else:
            from medray.workflows.prediction import predict_files

            if not inputs:
                raise typer.BadParameter("name at least one image, or a folder of them, after the bundle")
            summary = predict_files(
                Path(bundle), inputs, out, runtime, device=device, precision=precision, overlays=overlays, progress=show
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
