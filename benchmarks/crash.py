"""Does a study survive kill -9 of a trial, of the driver and of Ray's head, at random times?

Studies run by the command line, as a user runs them. At seeded random moments (imports, search, final fit and report
included) one process of a study gets SIGKILL; where that ends the study, ``medray tune --resume`` follows at once,
while orphans may still be dying. Everything random in a study is drawn from its seed, so each is compared with one that
was left alone: every trial has to come out with the same parameters and, on a CPU, the same values to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.common import Figure, Result, Target

Victim = Literal["trial", "driver", "head"]
VICTIMS: tuple[Victim, ...] = ("trial", "driver", "head")

SPACE = """\
defaults: [task: classification, augment: light, _self_]
data: phantom://xray-nodules?cases=40&size=32
device: cpu
model: {name: small_cnn, feature_size: 16}
train: {epochs: EPOCHS, validate_every: 2, batch_size: 8, deterministic: true}
study: {budget: 3h, pruner: none, sampler: random, concurrency: 2, ensemble: false, objectives: {val/auc: max}}
space:
  optim.lr: {float: [1.0e-4, 1.0e-2], log: true}
  optim.weight_decay: {float: [1.0e-4, 1.0e-1], log: true}
"""
NAME = "crash"
PATIENCE = 300.0
"""Seconds in which a step of a study that nobody disturbs must come; beyond, it hangs."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One process to kill.

    Attributes:
        victim: which.
        after: seconds after the sitting began, or after the last kill.
        finished: trials that must have ended before it.
    """

    victim: Victim
    after: float
    finished: int = 0


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """What study.db says of a trial."""

    state: str
    params: dict[str, Any] | None
    values: tuple[float, ...]

    @property
    def is_finished(self) -> bool:
        """Whether anything that was reached could be lost."""
        return self.state in ("COMPLETE", "PRUNED")


Snapshot = dict[int, TrialRow]


@dataclass(kw_only=True)
class Account:
    """What became of the studies.

    Attributes:
        kills: processes killed, by what they were.
        lost: finished trials that study.db no longer had, or had with another value.
        renumbered: trials in flight that did not come again with the same number and parameters.
        failed: trials that the study gave up.
        unusable: studies that could not be resumed, or ended without report or bundle.
        unlike: trials whose values differ from those of the study that was left alone.
        resumed: ``--resume`` that was needed.
        noticed: seconds from a head's death to the driver's end.
        notes: what went wrong, in words.
    """

    kills: dict[Victim, int] = field(default_factory=lambda: dict.fromkeys(VICTIMS, 0))
    studies: int = 0
    lost: int = 0
    renumbered: int = 0
    failed: int = 0
    unusable: int = 0
    unlike: int = 0
    resumed: int = 0
    noticed: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, before: Snapshot, after: Snapshot) -> None:
        """Count what a kill has cost, from study.db before and after it."""
        for number, row in before.items():
            now = after.get(number)
            if row.is_finished and now != row:
                self.lost += 1
                self.notes.append(f"trial {number} was {row}, became {now}")
            elif row.params is not None and (now is None or now.params != row.params):
                self.renumbered += 1
                self.notes.append(f"trial {number} was {row}, became {now}")


def run(quick: bool) -> Result:
    """Figures: kills, and what each kind of loss came to; all losses must be nought."""
    generator = random.Random(0)
    wanted, span, trials, epochs = (3, 20.0, 3, 8) if quick else (20, 30.0, 8, 30)
    kills = [Kill(victim=VICTIMS[i % 3], after=generator.uniform(1.0, span)) for i in range(wanted)]
    with tempfile.TemporaryDirectory() as folder:
        account = torment(Path(folder), kills, trials=trials, epochs=epochs, with_reference=not quick)
    figures = {
        "kills": Figure(value=sum(account.kills.values())),
        **{f"kills_{victim}": Figure(value=count) for victim, count in account.kills.items()},
        "studies": Figure(value=account.studies),
        "resumed": Figure(value=account.resumed),
        "finished_lost": Figure(value=account.lost),
        "other_trial_ids": Figure(value=account.renumbered),
        "trials_failed": Figure(value=account.failed),
        "studies_unusable": Figure(value=account.unusable),
    }
    if not quick:
        figures["values_unlike_undisturbed"] = Figure(value=account.unlike)
    if account.noticed:
        figures["head_death_noticed"] = Figure(value=max(account.noticed), unit="s")
    none = Target(op="==", value=0)
    judged = ("finished_lost", "other_trial_ids", "trials_failed", "studies_unusable", "values_unlike_undisturbed")
    targets = {name: none for name in judged if name in figures}
    if not quick:
        targets["kills"] = Target(op=">=", value=20)
    return Result(figures=figures, targets=targets, notes=account.notes)


def torment(work: Path, kills: Sequence[Kill], *, trials: int, epochs: int, with_reference: bool = False) -> Account:
    """Run studies until all kills are spent; each ends by itself.

    Args:
        work: an empty folder.
        kills: in their order. A study that ends before its next kill leaves it to the next study.
        trials: of each study.
        epochs: of each trial, and of the final fits.
        with_reference: run one study undisturbed first, and compare the others with it.
    """
    space = work / "space.yaml"
    space.write_text(SPACE.replace("EPOCHS", str(epochs)), encoding="utf-8")
    account = Account()
    reference: Snapshot = {}
    left = list(kills)
    if with_reference:
        reference = _torment_one(work, [], trials, account)
        account.studies = 0
    while left and not account.unusable:
        before = len(left)
        finished = _torment_one(work, left, trials, account)
        if len(left) == before:  # the machine is too fast for that moment
            left[0] = replace(left[0], after=left[0].after / 2)
        for number, row in reference.items():
            if finished.get(number) != row:
                account.unlike += 1
                account.notes.append(f"trial {number} is {finished.get(number)}; undisturbed it was {row}")
    return account


def _torment_one(work: Path, kills: list[Kill], trials: int, account: Account) -> Snapshot:
    """One study; takes what it uses from ``kills``. Gives study.db's last state."""
    account.studies += 1
    home = work / f"study-{account.studies}-{len(kills)}"
    home.mkdir()
    folder = home / "runs" / NAME
    started = [
        "tune",
        str(work / "space.yaml"),
        f"study.name={NAME}",
        f"study.trials={trials}",
        "study.warm_start=false",
    ]
    everyone: list[psutil.Process] = []
    last: Snapshot = {}
    sitting = _start(home, started)
    began = time.monotonic()
    try:
        while True:
            _await_study(folder, sitting)
            kill = kills[0] if kills else None
            target = _victim(sitting, folder, kill, began) if kill else None
            if kill is None or target is None:
                break  # the study runs, or has run, to its end
            kills.pop(0)
            everyone += _family(sitting)
            before = read_trials(folder)
            with contextlib.suppress(psutil.NoSuchProcess):
                target.kill()
                account.kills[kill.victim] += 1
            account.compare(last, before)
            killed = began = time.monotonic()
            if kill.victim != "trial":
                _await_end(sitting)
                if kill.victim == "head":
                    account.noticed.append(time.monotonic() - killed)
                account.compare(before, read_trials(folder))
                account.resumed += 1
                sitting = _start(home, ["tune", "--resume", str(folder)])
                began = time.monotonic()
            last = read_trials(folder)
        _await_end(sitting, patience=4 * PATIENCE)
        after = read_trials(folder)
        account.compare(last, after)
        _judge(folder, home, sitting.returncode, after, trials, account)
    except TimeoutError as error:
        account.unusable += 1
        account.notes.append(f"{error}; its last words:\n{_log(home)}")
        after = read_trials(folder)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone += _family(sitting)
        _bury(sitting, everyone)
    shutil.rmtree(home, ignore_errors=True)
    return after


def _judge(folder: Path, home: Path, code: int, rows: Snapshot, trials: int, account: Account) -> None:
    """Whether a study that has ended is whole."""
    from medray.bundle.read import Bundle
    from medray.errors import MedrayError

    problem = None
    if code != 0:
        problem = f"ended with {code}"
    elif not (folder / "report.html").is_file() or not (folder / "result.json").is_file():
        problem = "has no report"
    elif sorted(rows) != list(range(trials)):
        problem = f"has the trials {sorted(rows)} instead of 0..{trials - 1}"
    else:
        try:
            Bundle.open(folder / "bundle")  # checks every file's digest
        except MedrayError as error:
            problem = f"has no bundle: {error}"
    if problem:
        account.unusable += 1
        account.notes.append(f"a study {problem}; its last words:\n{_log(home)}")
    failed = [number for number, row in rows.items() if not row.is_finished]
    account.failed += len(failed)
    for number in failed:
        said = folder / "trials" / f"{number:04d}" / "error.txt"
        text = said.read_text(encoding="utf-8") if said.is_file() else "no error.txt"
        account.notes.append(f"trial {number} is {rows[number].state}: {text[-600:]}")


def read_trials(folder: Path) -> Snapshot:
    """What study.db says, read beside a driver that may be writing; empty before its first trial."""
    path = folder / "study.db"
    if not path.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30.0)) as database:
        try:
            rows = database.execute("SELECT trial_id, number, state FROM trials WHERE state != 'WAITING'").fetchall()
            values = database.execute("SELECT trial_id, value FROM trial_values ORDER BY objective").fetchall()
            params = dict(
                database.execute("SELECT trial_id, value_json FROM trial_user_attributes WHERE key = 'params'")
            )
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # it is being made
                return {}
            raise
    return {
        number: TrialRow(
            state=state,
            params=json.loads(params[key]) if key in params else None,
            values=tuple(value for trial, value in values if trial == key),
        )
        for key, number, state in rows
    }


# Processes -----------------------------------------------------------------------------------------------------------


def _start(home: Path, words: Sequence[str]) -> subprocess.Popen[bytes]:
    with (home / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "medray", *words], cwd=home, stdout=log, stderr=log, start_new_session=True
        )


def _victim(sitting: subprocess.Popen[bytes], folder: Path, kill: Kill, began: float) -> psutil.Process | None:
    """The process to kill, once its time has come; None where the study ends before."""
    while sitting.poll() is None:
        if time.monotonic() - began >= kill.after and _finished(folder) >= kill.finished:
            found = _candidates(sitting, kill.victim)
            if found:
                return random.Random(round(1e3 * kill.after)).choice(found)
        if time.monotonic() - began > kill.after + PATIENCE:
            raise TimeoutError(f"no {kill.victim} to kill came in {PATIENCE:.0f} s")
        time.sleep(0.02)
    return None


def _finished(folder: Path) -> int:
    return sum(row.is_finished for row in read_trials(folder).values())


def _candidates(sitting: subprocess.Popen[bytes], victim: Victim) -> list[psutil.Process]:
    if victim == "driver":
        return [psutil.Process(sitting.pid)]
    found = []
    for process in _family(sitting):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            is_head = process.name() in ("raylet", "gcs_server")
            # Ray's own helpers bear such titles too: ray::IDLE, ray::RuntimeEnvAgent, ray::DashboardAgent.
            is_trial = line.startswith("ray::") and not line.startswith("ray::IDLE") and "Agent" not in line
            if (victim == "head" and is_head) or (victim == "trial" and is_trial):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def _family(sitting: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(sitting.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _await_study(folder: Path, sitting: subprocess.Popen[bytes]) -> None:
    """Until there is a study that can be resumed: before, a kill has nothing to spoil."""
    deadline = time.monotonic() + PATIENCE
    while not (folder / "study.yaml").exists() and sitting.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no study began within {PATIENCE:.0f} s")
        time.sleep(0.05)


def _await_end(sitting: subprocess.Popen[bytes], *, patience: float = PATIENCE) -> None:
    try:
        sitting.wait(patience)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"a study stood still for {patience:.0f} s") from None


def _bury(sitting: subprocess.Popen[bytes], everyone: Sequence[psutil.Process]) -> None:
    """End what is left of a study; psutil knows a process by its start time too, so a reused id is left alone."""
    if sitting.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(sitting.pid, signal.SIGKILL)
        sitting.wait()
    for process in _alive(everyone):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _alive(everyone: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    for process in everyone:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _log(home: Path) -> str:
    path = home / "log.txt"
    return path.read_text(encoding="utf-8", errors="replace")[-2000:] if path.is_file() else ""
