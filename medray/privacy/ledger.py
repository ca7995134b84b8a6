"""A site's account of the privacy that it has spent: one append-only file, which all of its runs are charged to.

The file is a :class:`~medray.privacy.chain.Chain`. What a run may do is *reserved*, durably, before
its first step and *settled* after its last; what was never settled counts in full, so that no crash makes the file
forget. Epsilon is composed over every mechanism in it, whatever the data set: patients of two sets may be the same.

Times are written down for readers and never decide what counts: a year's budget begins anew only where a person of the
site opens one (:meth:`Ledger.renew`), so that no clock can free by itself what was spent.

The file is as safe as the disk that it lies on: who may write to it may also replace it. A copy of :attr:`Ledger.head`
kept elsewhere shows that.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medray.errors import PrivacyError
from medray.privacy.accountant import History, Mechanism, Spent, epsilon, merged
from medray.privacy.chain import Chain, Lines

__all__ = ["Entry", "Ledger", "Limits", "Reservation"]

Compose = Callable[[History, float], Spent]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site allows.

    Attributes:
        epsilon: of everything that the ledger will ever hold.
        delta: at which all epsilons of the ledger are stated.
        per_run: of any single run; None: as much as is left.
        per_year: of all runs since the year was opened; None: as much as is left.
    """

    epsilon: float
    delta: float
    per_run: float | None = None
    per_year: float | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "per_run", "per_year"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise PrivacyError(f"{name}={value!r} of a ledger must be a finite number above 0")
        if not (isinstance(self.delta, float) and 0 < self.delta < 0.1):
            raise PrivacyError(f"delta={self.delta!r} of a ledger must lie between 0 and .1; take 1e-5")


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """What a run may do; hand it to :meth:`Ledger.settle` when it has ended.

    Attributes:
        id: of the ledger's line.
        run: whose it is.
        history: (sigma, rate, steps), in the order of ``steps_done``.
    """

    id: str
    run: str
    history: tuple[Mechanism, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A reservation and what became of it.

    Attributes:
        settled: what was done of it; None where it was never settled, and counts in full.
        year: of the ledger that it fell into, from 0.
        data: what was trained on, in words.
        when: ISO time of the reservation, as the site's clock had it.
    """

    reservation: Reservation
    settled: tuple[Mechanism, ...] | None
    year: int
    data: str
    when: str

    @property
    def counted(self) -> tuple[Mechanism, ...]:
        """What it is charged with."""
        return self.reservation.history if self.settled is None else self.settled


@dataclass
class _State:
    """A ledger as read."""

    lines: Lines
    limits: Limits | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    year: int = 0
    last_renewal: str = ""

    def history(self, *, year: int | None = None) -> list[Mechanism]:
        chosen = [entry for entry in self.entries.values() if year is None or entry.year == year]
        return [mechanism for entry in chosen for mechanism in entry.counted]


class Ledger:
    """The ledger at ``path``.

    Every method reads the file anew under a lock, so that processes may share it.

    Args:
        path: of the file; :meth:`create` makes one.
        compose: epsilon of a history at a delta.
    """

    def __init__(self, path: str | os.PathLike[str], *, compose: Compose = epsilon) -> None:
        self.path, self._compose = Path(path), compose
        self._chain = Chain(path, "a ledger")

    @classmethod
    def create(cls, path: str | os.PathLike[str], limits: Limits, *, compose: Compose = epsilon) -> Ledger:
        """Begin a ledger.

        Raises:
            PrivacyError: the file exists: a ledger is never begun anew.
        """
        ledger = cls(path, compose=compose)
        try:
            ledger._chain.create()
        except FileExistsError:
            raise PrivacyError(
                f"{path} exists already, and a ledger is never begun anew. See it with: medray site budget {path}"
            ) from None
        except OSError as error:
            raise PrivacyError(f"{path}: can't be written ({error.strerror}). Choose a folder of this site's") from None
        with ledger._locked() as state:
            ledger._append(state, {"kind": "open", **_plain(limits)})
        return ledger

    # -- what a run does
    # -----------------------------------------------------------------------------------------------------------------

    def reserve(self, *, run: str, history: History, data: str = "") -> Reservation:
        """Set aside what a run may do, before it does any of it.

        Args:
            run: its name, for readers.
            history: all mechanisms of the run, as many steps as it may make at most.
            data: what it trains on, for readers; it frees nothing.

        Raises:
            PrivacyError: over budget, with what is left; or the ledger is damaged.
        """
        wanted = tuple(_mechanism(row) for row in history)
        if not merged(wanted):
            raise PrivacyError(f"run '{run}' reserves nothing: give its mechanisms (sigma, rate, steps) with steps > 0")
        with self._locked() as state:
            self._refuse_over_budget(state, run, wanted)
            reservation = Reservation(id=secrets.token_hex(8), run=run, history=wanted)
            self._append(
                state,
                {"kind": "reserve", "id": reservation.id, "run": run, "data": data, "history": _rows(wanted)},
            )
        return reservation

    def settle(self, reservation: Reservation, *, steps_done: int | Sequence[int]) -> None:
        """Record what was done of a reservation; the rest is given back. Settling again with the same changes nothing.

        Args:
            reservation: of this ledger.
            steps_done: of each of its mechanisms; a single number where it has one.

        Raises:
            PrivacyError: more than was reserved (that part was never allowed), an unknown reservation, or one that was
                settled otherwise.
        """
        done = [steps_done] if isinstance(steps_done, int) else list(steps_done)
        with self._locked() as state:
            entry = state.entries.get(reservation.id)
            if entry is None:
                raise PrivacyError(f"{self.path}: there is no reservation '{reservation.id}' to settle; reserve first")
            reserved = entry.reservation.history
            if len(done) != len(reserved) or any(
                not 0 <= n <= most for n, (_, _, most) in zip(done, reserved, strict=False)
            ):
                raise PrivacyError(
                    f"{self.path}: run '{entry.reservation.run}' reserved {[row[2] for row in reserved]} steps and "
                    f"settles {done}; each must lie between 0 and what was reserved. It counts in full until then"
                )
            settled = tuple((sigma, rate, n) for (sigma, rate, _), n in zip(reserved, done, strict=True))
            if entry.settled is not None:
                if entry.settled != settled:
                    raise PrivacyError(f"{self.path}: reservation '{reservation.id}' has been settled otherwise before")
                return
            self._append(state, {"kind": "settle", "id": reservation.id, "done": done})

    def find(self, identifier: str) -> Reservation | None:
        """The reservation of that id, where it has not been settled: a run that goes on after a crash has it still."""
        with self._locked() as state:
            entry = state.entries.get(identifier)
        return None if entry is None or entry.settled is not None else entry.reservation

    # -- what a site asks and decides
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        with self._locked() as state:
            return self._limits(state)

    @property
    def head(self) -> str:
        """Hash of the last whole line: kept elsewhere, it shows whether the file was replaced."""
        with self._locked() as state:
            return state.lines.head

    def entries(self) -> tuple[Entry, ...]:
        """All reservations, oldest first."""
        with self._locked() as state:
            return tuple(state.entries.values())

    def history(self, *, this_year: bool = False) -> list[Mechanism]:
        """Everything that counts: what was settled, and in full what was not."""
        with self._locked() as state:
            return state.history(year=state.year if this_year else None)

    def spent(self, *, this_year: bool = False) -> Spent:
        """Epsilon of everything that counts, at the ledger's delta."""
        with self._locked() as state:
            delta = self._limits(state).delta
            return self._compose(state.history(year=state.year if this_year else None), delta)

    def remaining(self) -> float:
        """Epsilon between what was spent and the nearest limit; 0 where none is left.

        Epsilons compose to less than their sum, so that a run of a somewhat larger one may still fit in:
        :meth:`reserve` has the last word.
        """
        with self._locked() as state:
            limits = self._limits(state)
            left = limits.epsilon - self._compose(state.history(), limits.delta).epsilon
            if limits.per_year is not None:
                year = self._compose(state.history(year=state.year), limits.delta).epsilon
                left = min(left, limits.per_year - year)
            return max(0.0, left)

    def renew(self, *, by: str) -> None:
        """Open a new year: ``per_year`` counts from here; the whole ledger's limit stays. A person's decision.

        Args:
            by: who decided, for readers.

        Raises:
            PrivacyError: less than 365 days have gone since the last, as far as this clock can tell.
        """
        with self._locked() as state:
            self._limits(state)
            since = datetime.datetime.fromisoformat(state.last_renewal)
            gone = (_now() - since).days
            if gone < 365:
                raise PrivacyError(
                    f"{self.path}: the year was opened on {since:%Y-%m-%d}, {gone} days ago by this clock. "
                    "A new one can be opened after 365"
                )
            self._append(state, {"kind": "renew", "by": by})

    def set_limits(self, limits: Limits, *, by: str) -> None:
        """Change what the site allows; what was spent stays. A person's decision, kept in the file."""
        with self._locked() as state:
            self._limits(state)
            self._append(state, {"kind": "limits", "by": by, **_plain(limits)})

    def verify(self) -> str | None:
        """What is wrong with the file, naming the first broken line; None where nothing is.

        A torn last line is what a crash in the middle of a write leaves: it was never acted upon, and is no fault.
        """
        try:
            with self._locked():
                return None
        except PrivacyError as error:
            return str(error)

    # -- the file
    # -----------------------------------------------------------------------------------------------------------------

    def _refuse_over_budget(self, state: _State, run: str, wanted: Sequence[Mechanism]) -> None:
        limits = self._limits(state)
        checks: list[tuple[str, float | None, list[Mechanism]]] = [
            ("a run", limits.per_run, []),
            ("a year", limits.per_year, state.history(year=state.year)),
            ("ever", limits.epsilon, state.history()),
        ]
        for what, limit, before in checks:
            if limit is None:
                continue
            after = self._compose([*before, *wanted], limits.delta).epsilon
            if after > limit:
                spent = self._compose(before, limits.delta).epsilon
                raise PrivacyError(
                    f"{self.path}: run '{run}' would bring epsilon to {after:.4g} at delta={limits.delta:g}, and this "
                    f"site allows {limit:g} {what}, of which {spent:.4g} is spent. Lower privacy.epsilon or "
                    "train.epochs, or ask the site to raise its limit (medray site limits; in a federation site.yaml)"
                )

    def _limits(self, state: _State) -> Limits:
        if state.limits is None:
            raise PrivacyError(
                f"{self.path}: this ledger was never opened (a crash cut its first line). Delete it, and create it anew"
            )
        return state.limits

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_State]:
        """The file's state, with nobody else writing."""
        try:
            with self._chain.locked() as lines:
                state = _State(lines)
                for number, record in enumerate(lines.records):
                    try:
                        _take(state, record, first=number == 0)
                    except (ValueError, TypeError, KeyError, RecursionError, PrivacyError) as error:
                        raise self._chain.broken(number + 1, error) from None
                yield state
        except FileNotFoundError:
            raise PrivacyError(
                f"{self.path}: there is no ledger. Create it with: medray site open {self.path} --epsilon 10"
            ) from None

    def _append(self, state: _State, record: dict[str, Any]) -> None:
        self._chain.append(state.lines, {"time": _now().isoformat(timespec="seconds"), **record})


def _take(state: _State, record: dict[str, Any], *, first: bool) -> None:
    """Apply one line to what was read before it."""
    kind = record["kind"]
    if (kind == "open") != first:
        raise ValueError("a ledger is opened once, by its first line")
    if kind in ("open", "limits"):
        state.limits = Limits(**{name: record[name] for name in ("epsilon", "delta", "per_run", "per_year")})
        if kind == "open":
            state.last_renewal = record["time"]
    elif kind == "renew":
        state.year += 1
        state.last_renewal = record["time"]
    elif kind == "reserve":
        history = tuple(_mechanism(row) for row in record["history"])
        merged(history)
        reservation = Reservation(id=str(record["id"]), run=str(record["run"]), history=history)
        if reservation.id in state.entries:
            raise ValueError(f"reservation {reservation.id} exists already")
        state.entries[reservation.id] = Entry(
            reservation=reservation, settled=None, year=state.year, data=str(record["data"]), when=str(record["time"])
        )
    elif kind == "settle":
        entry = state.entries[record["id"]]
        done, reserved = record["done"], entry.reservation.history
        if entry.settled is not None or len(done) != len(reserved):
            raise ValueError("it settles what it may not")
        rows = [(s, q, int(n)) for (s, q, _), n in zip(reserved, done, strict=True)]
        if any(not 0 <= row[2] <= most[2] for row, most in zip(rows, reserved, strict=True)):
            raise ValueError("it settles other steps than were reserved")
        state.entries[record["id"]] = Entry(
            reservation=entry.reservation, settled=tuple(rows), year=entry.year, data=entry.data, when=entry.when
        )
    else:
        raise ValueError(f"there is no line of kind {kind!r}")


def _mechanism(row: Sequence[Any]) -> Mechanism:
    sigma, rate, steps = row
    merged([(sigma, rate, steps)])
    return float(sigma), float(rate), int(steps)


def _rows(history: Sequence[Mechanism]) -> list[list[float | int]]:
    return [[sigma, rate, steps] for sigma, rate, steps in history]


def _plain(limits: Limits) -> dict[str, float | None]:
    return {
        "epsilon": limits.epsilon,
        "delta": limits.delta,
        "per_run": limits.per_run,
        "per_year": limits.per_year,
    }


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
