"""Does a group of processes survive the loss of any of them, and of its machine, at any time?

``medray train train.workers=2`` runs as a user runs it. At seeded random moments one of the two processes, the other,
or the raylet (which takes the whole machine of a local Ray with it) gets SIGKILL, checkpoints being written included.
Where the command ends by that, ``--resume`` follows. Batches follow from seed, epoch and position, so that each run is
compared with one that was left alone.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import Figure, Result, Target

VICTIMS = ("one worker", "the other worker", "raylet")
EXPERIMENT = """\
data: phantom://xray-nodules?cases=60&size=32
device: cpu
augment: {strength: 0.0}
model: {name: small_cnn, feature_size: 16, depth: 3, dropout: 0.0}
optim: {name: sgd, lr: 0.005}
train: {epochs: EPOCHS, validate_every: 1, batch_size: 6, workers: 2, precision: fp32}
"""
PATIENCE = 300.0


@dataclass(kw_only=True)
class Account:
    """What became of the runs."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    runs: int = 0
    incomplete: int = 0
    resumed: int = 0
    out_of_step: int = 0
    epochs: int = 0
    furthest: float = 0.0
    notes: list[str] = field(default_factory=list)


def run(quick: bool) -> Result:
    """Kills, runs that did not complete, epochs missing or trained twice, distance to the undisturbed run."""
    wanted, epochs = (1, 30) if quick else (20, 200)
    generator = random.Random(0)
    account = Account(epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "experiment.yaml").write_text(EXPERIMENT.replace("EPOCHS", str(epochs)), encoding="utf-8")
        reference = [] if quick else _history(_undisturbed(work))
        kills = [(VICTIMS[i % 3], generator.uniform(0.5, 6.0)) for i in range(wanted)]
        while kills and not account.incomplete:
            before = len(kills)
            _disturbed(work, kills, reference, account)
            if len(kills) == before:  # the machine is too fast for that moment
                kills[0] = (kills[0][0], kills[0][1] / 2)
    figures = {
        "kills": Figure(value=sum(account.kills.values())),
        **{f"kills, {name}": Figure(value=count) for name, count in account.kills.items()},
        "runs": Figure(value=account.runs),
        "runs_incomplete": Figure(value=account.incomplete),
        "resumed_by_hand": Figure(value=account.resumed),
        "runs_with_an_epoch_missing_or_twice": Figure(value=account.out_of_step),
    }
    targets = {
        "runs_incomplete": Target(op="==", value=0),
        "runs_with_an_epoch_missing_or_twice": Target(op="==", value=0),
    }
    if not quick:  # there is no undisturbed run to compare with
        figures["loss_from_undisturbed_at_most"] = Figure(value=account.furthest)
        targets["loss_from_undisturbed_at_most"] = Target(op="<=", value=0.02)
        targets["kills"] = Target(op=">=", value=20)
    return Result(
        figures=figures,
        targets=targets,
        notes=[
            "A checkpoint follows each validation, that is each epoch here. A lost process is replaced by Ray Train; "
            "a lost raylet ends the command of a local Ray, and --resume follows.",
            "Distance: of the mean training loss of any epoch, relative.",
            *account.notes,
        ],
    )


def _start(work: Path, out: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "medray", "train", str(work / "experiment.yaml"), "--out", str(out)]
    with (work / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*words, *(["--resume"] if resume else [])], cwd=work, stdout=log, stderr=log, start_new_session=True
        )


def _undisturbed(work: Path) -> Path:
    out = work / "reference"
    if _start(work, out, resume=False).wait(PATIENCE):
        raise RuntimeError((work / "reference.log").read_text(encoding="utf-8")[-3000:])
    return out


def _history(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "result.json").read_text(encoding="utf-8"))["history"]
    return found


def _disturbed(work: Path, kills: list[tuple[str, float]], reference: list[dict[str, Any]], account: Account) -> None:
    """One run to its end; takes the kills that it meets from ``kills``."""
    account.runs += 1
    out = work / f"run-{account.runs}"
    process = _start(work, out, resume=False)
    everyone: list[psutil.Process] = []
    deadline = time.monotonic() + PATIENCE
    try:
        while process.poll() is None or process.returncode:
            if process.poll() is not None:
                account.resumed += 1
                process = _start(work, out, resume=True)
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise TimeoutError(f"{out.name} stood still for {PATIENCE:.0f} s")
            if not kills:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                continue
            victim, after = kills[0]
            target = _await(process, victim, out, after)
            if target is None:
                continue
            everyone += _family(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                target.kill()
                account.kills[victim] += 1
                kills.pop(0)
            deadline = time.monotonic() + PATIENCE
        found = _history(out)
        if [row["epoch"] for row in found] != list(range(1, account.epochs + 1)):
            account.out_of_step += 1
            account.notes.append(f"{out.name}: epochs {[row['epoch'] for row in found]}")
        for mine, theirs in zip(found, reference, strict=True) if reference else ():
            account.furthest = max(account.furthest, abs(mine["loss"] / theirs["loss"] - 1))
    except (TimeoutError, OSError, ValueError) as error:
        account.incomplete += 1
        said = (work / f"{out.name}.log").read_text(encoding="utf-8")[-1500:]
        account.notes.append(f"{type(error).__name__}: {error}; its last words:\n{said}")
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone += _family(process)
        if process.poll() is None:
            process.kill()
            process.wait()
        for left in everyone:
            with contextlib.suppress(psutil.Error):
                left.kill()


def _await(process: subprocess.Popen[bytes], victim: str, out: Path, after: float) -> psutil.Process | None:
    """The process to kill, once the group has trained and saved for a while; None where the command ends before."""
    while process.poll() is None:
        found = _find(process, victim)
        if found is not None and _saved(out):
            time.sleep(after)
            return found if found.is_running() and process.poll() is None else None
        time.sleep(0.05)
    return None


def _find(process: subprocess.Popen[bytes], victim: str) -> psutil.Process | None:
    family = _family(process)
    if victim == "raylet":
        return next((p for p in family if _name(p) == "raylet"), None)
    ranks = sorted((p for p in family if "RayTrainWorker" in _line(p)), key=lambda p: p.create_time())
    if len(ranks) < 2:
        return None
    return ranks[0] if victim == "one worker" else ranks[1]


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _saved(out: Path) -> int:
    """Validations that the checkpoint holds."""
    from medray.train import checkpoint

    state = checkpoint.load(out / "checkpoint.pt")
    return 0 if state is None else len(state["history"])
