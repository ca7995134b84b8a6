"""``medray predict``: a bundle on new images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import say


def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    inputs: Annotated[list[Path], typer.Argument(help="Images, DICOM series folders, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the answers go.")] = Path("predictions"),
    runtime: Annotated[Literal["torch", "onnx"], typer.Option(help="What computes; both answer alike.")] = "onnx",
) -> None:
    """Predict: NIfTI in, NIfTI out; DICOM in, DICOM-SEG out; pictures in, masks or a table of probabilities out."""
    from medray.workflows.prediction import predict_files

    for path in predict_files(bundle, inputs, out, runtime=runtime):
        say(str(path))
