"""What a site's training costs its patients, charged to the site's ledger before it happens."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from medray.config.federation_files import SiteConfig
from medray.errors import PrivacyError
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.ledger import Ledger, Limits

__all__ = ["Charges", "open_ledger"]


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
class _Open:
    """The run that is being charged: its recipe, its reservation, and the steps that were begun."""

    run: str
    reservation: str
    begun: int


class Charges:
    """Charges rounds of training to a ledger.

    All steps of a run are reserved before its first round, and counted off, on the disk, before each round begins. A
    round that the server asks for again is training again: it is reserved on top. What a run didn't do is given back
    when another one begins; a run that never comes back counts in full.

    Args:
        ledger: of the site.
        path: where the run that is being charged is written down.
    """

    def __init__(self, ledger: Ledger, path: Path) -> None:
        self.ledger, self._path = ledger, path

    def __call__(self, run: str, plan: PrivacyPlan, steps: int) -> None:
        """Charge ``steps`` steps of a run, before they are made.

        Raises:
            PrivacyError: over budget; then nothing may be trained.
        """
        now = self._read()
        held = None if now is None or now.run != run else self.ledger.find(now.reservation)
        # A reservation that was settled, or made for other noise or other cases, covers nothing of this.
        if now is None or held is None or held.history != tuple(plan.history):
            if now is not None:
                self._close(now)
            held = self.ledger.reserve(run=run[:16], history=plan.history, data="federation")
            now = _Open(run=run, reservation=held.id, begun=0)
            self._write(now)
        if now.begun + steps > plan.steps:
            again = [(plan.noise_multiplier, plan.sample_rate, steps)]
            self.ledger.reserve(run=f"{run[:16]} again", history=again, data="federation")
            return
        self._write(_Open(run=now.run, reservation=now.reservation, begun=now.begun + steps))

    def running(self, run: str) -> bool:
        """Whether it is this run that is being charged."""
        now = self._read()
        return now is not None and now.run == run

    def _close(self, run: _Open) -> None:
        reservation = self.ledger.find(run.reservation)
        if reservation is not None:
            self.ledger.settle(reservation, steps_done=min(run.begun, reservation.history[0][2]))

    def _read(self) -> _Open | None:
        """The run being charged; where what is written can't be read, none: its reservation then counts in full."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return _Open(run=str(found["run"]), reservation=str(found["reservation"]), begun=int(found["begun"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, run: _Open) -> None:
        text = json.dumps({"run": run.run, "reservation": run.reservation, "begun": run.begun})
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
