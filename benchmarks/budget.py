"""Can a site's privacy budget ever show less than was spent, and does its epsilon agree with an independent accountant?

Runs reserve, train, settle, are killed at any byte of any write, and start again, while the clock jumps: 10,000 such
histories in the full run, 200 in the quick one. After each, no run may have made more steps than the ledger counts for
it, and all together may not exceed the limits. The epsilons of a grid of histories stand beside Google's dp-accounting
(privacy loss distributions), which shares no code with ours.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import Figure, Result, Target
from medray.errors import PrivacyError
from medray.privacy import chain, ledger
from medray.privacy.accountant import History, Spent, epsilon
from medray.privacy.ledger import Ledger, Limits, Reservation

EXAMPLES, QUICK_EXAMPLES = 10_000, 200
Choose = Callable[[int, int], int]
"""A whole number from the first to the second, both included: by lot, or as a property test wants it."""

GRID: tuple[tuple[list[tuple[float, float, int]], float], ...] = (
    ([(5.0, 1.0, 1)], 1e-5),
    ([(1.1, 0.01, 1000)], 1e-5),
    ([(5.0, 1.0, 1), (1.5, 0.1, 300)], 1e-5),
    ([(20.0, 1.0, 50)], 1e-3),
    ([(4.0, 0.02, 100)], 1e-6),
    ([(1.0, 0.01, 200), (2.0, 0.05, 300), (0.7, 0.002, 1000)], 1e-5),
    ([(0.8, 0.05, 500)], 1e-5),
    ([(0.6, 0.01, 2000)], 1e-5),
)
QUICK_GRID = 5


class Killed(BaseException):
    """kill -9, as far as a test can have it: nothing after it runs but what the kernel does."""


class _Disk:
    """``os`` as the ledger sees it, whose writes may be cut short by a kill."""

    def __init__(self) -> None:
        self.left: int | None = None  # bytes until the kill; None for none
        self.after_sync = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, handle: int, data: bytes) -> int:
        if self.left is not None and self.left < len(data):
            os.write(handle, data[: self.left])
            raise Killed
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        os.fsync(handle)
        if self.left is not None and self.after_sync:
            raise Killed


def cheap(history: History, delta: float) -> Spent:
    """Stands in for an accountant: additive and fast. What is tested is what is counted, not how."""
    return Spent(sum(steps * (rate / sigma) ** 2 for sigma, rate, steps in history), delta, "rdp")


@contextlib.contextmanager
def _world() -> Iterator[tuple[_Disk, list[dt.datetime]]]:
    disk, clock = _Disk(), [dt.datetime(2030, 1, 1, tzinfo=dt.UTC)]
    with mock.patch.object(chain, "os", disk), mock.patch.object(ledger, "_now", lambda: clock[0]):
        yield disk, clock


def scenario(choose: Choose, folder: Path) -> str | None:
    """One history of a ledger; the counter-example in words, None where there is none."""
    path = folder / "ledger.jsonl"
    limits = Limits(epsilon=float(choose(1, 40)), delta=1e-5, per_run=20.0, per_year=25.0)
    made: dict[str, int] = {}  # run to steps that were really made
    held: dict[str, Reservation] = {}
    with _world() as (disk, clock):
        Ledger.create(path, limits, compose=cheap)
        for number in range(choose(1, 14)):
            disk.left = choose(0, 400) if choose(0, 2) == 0 else None
            disk.after_sync = choose(0, 1) == 1
            clock[0] += dt.timedelta(days=choose(-800, 800))
            try:
                _act(Ledger(path, compose=cheap), choose, number, made, held)
            except Killed:
                pass
            except PrivacyError as error:
                if "broken" in str(error):
                    return f"a kill broke the ledger: {error}"
            disk.left = None
            wrong = _judge(Ledger(path, compose=cheap), made, limits)
            if wrong:
                return wrong
    return None


def _act(ledger: Ledger, choose: Choose, number: int, made: dict[str, int], held: dict[str, Reservation]) -> None:
    what = choose(0, 5)
    if what <= 2 or not held:
        run, steps = f"run-{number}", choose(1, 12)
        held[run] = ledger.reserve(run=run, history=[(1.0, 1.0, steps)])  # a kill: nothing was handed out
        made[run] = choose(0, steps)
    elif what <= 4:
        run = sorted(held)[choose(0, len(held) - 1)]
        reservation = held[run]
        if ledger.find(reservation.id) is not None:  # it goes on after a restart, within what it reserved
            made[run] = choose(made[run], reservation.history[0][2])
            ledger.settle(reservation, steps_done=made[run])
    else:
        ledger.renew(by="a person")


def _judge(ledger: Ledger, made: dict[str, int], limits: Limits) -> str | None:
    counted = {entry.reservation.run: sum(n for _, _, n in entry.counted) for entry in ledger.entries()}
    for run, steps in made.items():
        if counted.get(run, 0) < steps:
            return f"{run} made {steps} steps, and the ledger counts {counted.get(run, 0)}"
    true = float(sum(made.values()))
    if ledger.spent().epsilon < true:
        return f"spent {true}, shown {ledger.spent().epsilon}"
    if true > limits.epsilon:
        return f"spent {true} of {limits.epsilon}"
    return None


def compare(grid: Sequence[tuple[list[tuple[float, float, int]], float]]) -> list[float]:
    """Our epsilon over dp-accounting's, less one, for each history."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    ratios = []
    for history, delta in grid:
        peer = PLDAccountant(value_discretization_interval=1e-4)
        for sigma, rate, steps in history:
            peer.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
        ratios.append(epsilon(history, delta).epsilon / peer.get_epsilon(delta) - 1)
    return ratios


def run(quick: bool) -> Result:
    """Histories by lot, then the grid."""
    rng = random.Random(4)
    examples = QUICK_EXAMPLES if quick else EXAMPLES
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(examples):
            place = Path(folder, str(number))
            place.mkdir()
            wrong = scenario(rng.randint, place)
            if wrong:
                found.append(f"example {number}: {wrong}")
    ratios = compare(GRID[:QUICK_GRID] if quick else GRID)
    figures = {
        "histories": Figure(value=examples),
        "counter_examples": Figure(value=len(found)),
        "epsilon_above_peer": Figure(value=100 * max(ratios), unit="%"),
        "epsilon_below_peer": Figure(value=100 * max(0.0, -min(ratios)), unit="%"),
    }
    targets = {
        "counter_examples": Target(op="==", value=0),
        "epsilon_above_peer": Target(op="<=", value=1.0),
        "epsilon_below_peer": Target(op="<=", value=0.01),
    }
    notes = [*found[:5], "epsilon: PRV's upper bound beside dp-accounting 0.6's pessimistic PLD at a grid of 1e-4."]
    return Result(figures=figures, targets=targets, notes=notes)
