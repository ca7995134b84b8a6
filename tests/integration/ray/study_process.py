"""A study in a process of its own, for tests: ``python study_process.py FOLDER TRIALS SECONDS [ADDRESS]``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from medray.config.schema import StudyConfig
from medray.engines.ray.session import ray_session
from medray.engines.ray.tune import run_trials
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import Report, TrialEvent, TrialOutcome, TrialTask

SPACE = {"optim.lr": {"float": [1e-4, 1e-2], "log": True}, "model.name": {"choice": ["unet", "swin"]}}


def train(task: TrialTask, report: Report) -> TrialOutcome:
    """Nine epochs with a checkpoint after each; notes who ran which epoch."""
    checkpoint = task.directory / "epoch"
    done = int(checkpoint.read_text(encoding="ascii")) if checkpoint.exists() else 0
    value = task.params["optim.lr"]
    for epoch in range(done + 1, 10):
        time.sleep(task.payload / 9)
        with (task.directory / "epochs.txt").open("a", encoding="ascii") as log:
            log.write(f"{epoch} {os.getpid()}\n")
        temporary = checkpoint.with_suffix(".new")
        temporary.write_text(str(epoch), encoding="ascii")
        temporary.replace(checkpoint)
        if report({"fraction": epoch / 9, "step": epoch, "metrics": {"val/dice": value}}):
            break
    return TrialOutcome(metrics={"val/dice": value}, extras={"resumed_at": done})


def say(event: TrialEvent) -> None:
    print(json.dumps([event.kind, event.number, event.fraction]), flush=True)


def main(folder: Path, trials: int, seconds: float, address: str | None = None) -> None:
    config = StudyConfig(trials=trials, pruner="none")
    driver = StudyDriver(Space.parse(SPACE), config, {"val/dice": "max"}, folder, {"optim.lr": 0.5})
    with driver, ray_session(address=address, cpus=1):
        run_trials(driver, train, directory=folder, cpus_per_trial=1, concurrency=1, payload=seconds, on_event=say)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
