"""Train one experiment, follow its progress, go on where it was interrupted.

    python examples/train.py [FOLDER [SECONDS]]

On the command line: medray train data=DIR train.budget=20min --out FOLDER [--resume].
"""

from __future__ import annotations

import sys
from pathlib import Path

from medray.workflows.events import StudyEvent
from medray.workflows.training import train_experiment


def tell(event: StudyEvent) -> None:
    """Called while it trains; a notebook or a web page would draw this."""
    figures = ", ".join(f"{name} {value:.3f}" for name, value in event.metrics.items())
    share = "" if event.fraction is None else f" {event.fraction:4.0%}"
    print(f"{event.kind}{share}: {event.text} {figures}")


def main(folder: Path, seconds: float) -> None:
    # None: no experiment.yaml, so the plan's own default on `data`. Everything else is set as on the command line.
    # The schedule ends when the budget does: the learning rate has come down by then.
    trained = train_experiment(
        None,
        ["data=phantom://fundus-vessels?cases=12&size=32", f"train.budget={seconds:g}", "model.feature_size=8"],
        out=folder,
        resume=folder.exists(),  # a run that was interrupted goes on; one that has ended is returned as it is
        observer=tell,
    )
    print(trained.headline)
    print("files:", ", ".join(sorted(path.name for path in trained.directory.iterdir())))
    # trained.model is a plain torch module, trained.fit.history what happened on the way.


if __name__ == "__main__":
    main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example-train"),
        float(sys.argv[2]) if len(sys.argv) > 2 else 20.0,
    )
