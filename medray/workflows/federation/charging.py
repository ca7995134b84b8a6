"""What a site's training costs its patients, charged to the site's ledger before it happens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from medray.config.federation_files import SiteConfig
from medray.errors import PrivacyError
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.ledger import Ledger, Limits

__all__ = ["IDLE_SECONDS", "Charge", "Charges", "open_ledger"]

Charge = Callable[[PrivacyPlan, int], None]
"""Told the plan of the whole run and the steps of the round that is about to begin; raises where it may not.

No steps reserve the run: that comes before data are touched.
"""

IDLE_SECONDS = 24 * 3600.0
"""After so long without a question a run's reservation is given back, where another run wants to begin."""
REMEMBERED = 64
"""Runs of which it is known how much they have paid for."""


def open_ledger(rules: SiteConfig) -> Ledger:
    """The site's ledger, begun where there is none, with the limits that ``site.yaml`` states today.

    Raises:
        PrivacyError: it is damaged, or was begun at another delta.
    """
    limits = rules.privacy
    wanted = Limits(
        epsilon=limits.epsilon_ever,
        delta=limits.delta,
        per_run=limits.epsilon_per_run,
        per_year=limits.epsilon_per_year,
    )
    if not rules.ledger.exists():
        return Ledger.create(rules.ledger, wanted)
    ledger = Ledger(rules.ledger)
    if ledger.limits.delta != wanted.delta:
        raise PrivacyError(
            f"{rules.ledger}: was begun at delta={ledger.limits.delta:g}, and its epsilons can't be stated at "
            f"privacy.delta={wanted.delta:g}. Set that back in site.yaml"
        )
    if ledger.limits != wanted:
        ledger.set_limits(wanted, by="site.yaml")
    return ledger


@dataclass(frozen=True, kw_only=True)
class _Paid:
    """What a run has paid for.

    Attributes:
        noise, rate: of its steps.
        reservation: that its next steps are of; empty once it was given back.
        begun: steps that were begun of that reservation.
        before: steps that were begun of those before it, which were settled as such.
        heard: when the run was last charged, by the site's clock, which frees nothing that was spent.
    """

    noise: float
    rate: float
    reservation: str
    begun: int
    before: int
    heard: float


class Charges:
    """Charges rounds of training to a ledger; several runs may be at work at once.

    All steps of a run are reserved before its first round, and counted off, on the disk, before each round begins. A
    round that the server asks for again is training again: it is reserved on top. What a run that has fallen silent
    (:data:`IDLE_SECONDS`) didn't do is given back when another one wants to begin; should it come back, the rest of its
    steps is reserved anew. A run that never comes back, while no other begins, counts in full.

    Args:
        ledger: of the site.
        path: where it is written down what runs have paid for.
        clock: seconds since the epoch.
    """

    def __init__(self, ledger: Ledger, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.ledger, self._path, self._clock = ledger, path, clock

    def __call__(self, run: str, plan: PrivacyPlan, steps: int) -> None:
        """Charge ``steps`` steps of a run, before they are made.

        Args:
            run: recipe and run.
            plan: of the whole run.
            steps: of the round; none reserve the run.

        Raises:
            PrivacyError: over budget; then nothing may be trained.
        """
        now = self._known(run, plan)
        done = 0 if now is None else now.before + now.begun
        if done + steps > plan.steps:
            again = [(plan.noise_multiplier, plan.sample_rate, steps)]
            self.ledger.reserve(run=f"{run[:16]} again", history=again, data="federation")
            return
        if done == plan.steps:
            return  # all is paid for, and nothing more is asked
        if now is None or not now.reservation:
            self.give_back(but=run)
            left = plan.after(plan.steps - done)
            now = _Paid(
                noise=plan.noise_multiplier,
                rate=plan.sample_rate,
                reservation=self.ledger.reserve(run=run[:16], history=left, data="federation").id,
                begun=0,
                before=done,
                heard=self._clock(),
            )
            self._write({**self._read(), run: now})
        self._write({**self._read(), run: replace(now, begun=now.begun + steps, heard=self._clock())})

    def _known(self, run: str, plan: PrivacyPlan) -> _Paid | None:
        """What a run has paid for that is of any use to this plan of it."""
        now = self._read().get(run)
        if now is None:
            return None
        same = (now.noise, now.rate) == (plan.noise_multiplier, plan.sample_rate)
        if not now.reservation:
            return now if same else None
        held = self.ledger.find(now.reservation)
        if same and held is not None and held.history == tuple(plan.after(plan.steps - now.before)):
            return now
        # A reservation for other noise or other cases covers nothing of this, nor does one that was settled unknown
        # to us: nothing counts as paid.
        self._close(now)
        return None

    def running(self, run: str) -> bool:
        """Whether steps of this run are reserved."""
        now = self._read().get(run)
        return now is not None and bool(now.reservation) and self.ledger.find(now.reservation) is not None

    def give_back(self, *, but: str) -> None:
        """Settle the reservations of runs that have fallen silent; they keep what they began.

        Args:
            but: run that is being asked for now.
        """
        runs = self._read()
        for run, paid in runs.items():
            gone = self._clock() - paid.heard
            if run != but and paid.reservation and not 0 <= gone < IDLE_SECONDS:
                self._close(paid)  # a crash before the next line: should the run come back, it pays for all of it anew
                closed = replace(paid, reservation="", begun=0, before=paid.before + paid.begun)
                self._write({**self._read(), run: closed})

    def _close(self, paid: _Paid) -> None:
        reservation = self.ledger.find(paid.reservation)
        if reservation is not None:
            self.ledger.settle(reservation, steps_done=min(paid.begun, reservation.history[0][2]))

    def _read(self) -> dict[str, _Paid]:
        """By run; where what is written can't be read, none: their reservations then count in full."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                str(run): _Paid(
                    noise=float(row["noise"]),
                    rate=float(row["rate"]),
                    reservation=str(row["reservation"]),
                    begun=int(row["begun"]),
                    before=int(row["before"]),
                    heard=float(row["heard"]),
                )
                for run, row in found["runs"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, runs: dict[str, _Paid]) -> None:
        newest = sorted(runs, key=lambda run: (bool(runs[run].reservation), runs[run].heard))[-REMEMBERED:]
        text = json.dumps({"runs": {run: asdict(runs[run]) for run in newest}})
        partial = self._path.with_name(self._path.name + ".part")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a loss of power brings back the steps that were counted before
        finally:
            os.close(folder)
