"""``medray plan DATA``: measure the data, and write the strong default to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medray.cli.show import run_folder, say


def plan(
    data: Annotated[str, typer.Argument(help="A folder, table, dataset.json, .npz, DICOM tree, or phantom://NAME.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the plan [default: runs/NAME]")] = None,
    task: Annotated[
        str, typer.Option(help="What is to be learnt: classification, multilabel, segmentation, ordinal.")
    ] = "auto",
    budget: Annotated[str | None, typer.Option(help="Training time, such as 20min or 2h.")] = None,
) -> None:
    """Measure the data and write an experiment.yaml for this machine: the default that a search starts from."""
    from medray.workflows.planning import plan_data

    path = plan_data(data, out or run_folder(data), task=task, budget=_seconds(budget))
    say(f"experiment: {path}")
    say(f"train it with: medray train {path}")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from medray.config.compose import build_experiment, compose

    return build_experiment(compose(None, [f"train.budget={text}"]).explicit).train.budget
