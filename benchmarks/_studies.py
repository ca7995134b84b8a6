"""Whole studies, run as a user runs them: ``medray tune`` in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Figure

QUICK = 15.0
"""Seconds of a whole study in --quick."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A finished study.

    Attributes:
        result: ``result.json``.
        wall: seconds of the whole process, start to exit.
        directory: of the study.
    """

    result: dict[str, Any]
    wall: float
    directory: Path

    def metric(self, name: str) -> Figure:
        """A metric of the champion on the test cases."""
        value, low, high = self.result["metrics"][name]
        return Figure(value=value, low=low, high=high)

    @property
    def searched(self) -> bool:
        """Whether any trial was run: where the budget holds too few that tell anything, none is."""
        return len((self.directory / "leaderboard.csv").read_text(encoding="utf-8").splitlines()) > 1

    @property
    def gain(self) -> Figure:
        """Champion minus trial 0 retrained with the same budget, paired."""
        value, low, high = self.result["difference"]
        return Figure(value=value, low=low, high=high)


def work_folder(quick: bool) -> Path:
    """Where studies of benchmarks lie; an ended one is read, not run again. ``MEDRAY_BENCH_RUNS`` moves it."""
    folder = Path(os.environ.get("MEDRAY_BENCH_RUNS", ROOT / "runs")) / ("bench-quick" if quick else "bench")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def write_table(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """A CSV that medray reads as a data set."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def tune(space: str, work: Path, name: str, overrides: Sequence[str]) -> StudyRun:
    """Run a study to its end in ``work/runs/name``; one that has ended there already is read, not run again."""
    directory = work / "runs" / name
    log = work / f"{name}.log"
    if not (directory / "result.json").exists():
        command = [sys.executable, "-m", "medray", "tune", str(ROOT / "search_spaces" / space), f"study.name={name}"]
        command += ["study.warm_start=false"]  # studies of one benchmark must not learn from each other
        begun = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [*command, *overrides], cwd=work, stdout=file, stderr=subprocess.STDOUT, env=os.environ.copy()
            )
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}")
        (directory / "wall.json").write_text(json.dumps(time.monotonic() - begun), encoding="utf-8")
    wall = json.loads((directory / "wall.json").read_text(encoding="utf-8"))
    result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    return StudyRun(result=result, wall=wall, directory=directory)
