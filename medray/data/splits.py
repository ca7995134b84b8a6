"""Grouped, stratified splits: which cases train, which validate, which are held back.

A group (:attr:`Case.group`, the patient) is never torn apart. Groups are dealt out greedily, the rarest and largest
first, each to the part whose chi-square distance to its share of every feature (cases, classes, sites) falls most.
This is iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML
2011) with groups in place of samples. Ties are broken by a hash of (seed, group), so that neither the order of the
cases nor a library's random numbers decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.config.schema import SplitConfig
from medray.data.manifest import Case, Manifest
from medray.errors import DataError, LeakError

__all__ = ["Splits", "make_splits"]

_SITE_WEIGHT = 0.25  # sites are evened out where classes leave a choice
_COVER = 1e3  # what it is worth to show a part a class that it has not seen: more than any distance


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Indices into ``manifest.cases``, ascending; no group stands in two of them. ``test`` may be empty."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class _Table:
    """Groups and what they hold: ``counts`` is (groups, features), the first feature being the number of cases."""

    names: list[str]
    members: list[list[int]]
    counts: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]
    classes: slice

    def carriers(self, groups: Sequence[int]) -> npt.NDArray[np.int64]:
        """How many of ``groups`` show each class."""
        return np.count_nonzero(self.counts[list(groups), self.classes], axis=0)


def make_splits(manifest: Manifest, config: SplitConfig, seed: int) -> Splits:
    """Split the cases, deterministically by ``seed``.

    A split that the data give wins: validation and test cases are taken as they are, all others train; where no case
    is given for validation, fold ``config.fold`` of the training cases validates. Without one, ``config.test`` of the
    cases are held back first. A class that only one group shows is never validated on and one that only two show is
    never held back: training and validation come first. Every other class is in each part as far as whole groups
    allow.

    Raises:
        LeakError: the given split has a patient on two sides.
        DataError: there are too few groups for what is asked, or the given split leaves nothing to train on.
    """
    cases = manifest.cases
    val = [i for i, case in enumerate(cases) if case.split == "val"]
    test = [i for i, case in enumerate(cases) if case.split == "test"]
    given = bool(val or test)
    taken = {*val, *test}
    pool = [i for i in range(len(cases)) if i not in taken]
    if not pool:
        raise DataError(
            f"{manifest.source}: none of {len(cases)} cases may be trained on (val {len(val)}, test {len(test)}). "
            "Mark some cases train, or leave their split blank"
        )
    _refuse_leaks(cases, {"train": pool, "val": val, "test": test})
    if not given and config.test > 0:
        table = _tabulate(cases, pool, manifest)
        held = set(_hold_back(table, config.test, seed, manifest.source))
        test = sorted(i for g in held for i in table.members[g])
        pool = sorted(i for g in range(len(table.members)) if g not in held for i in table.members[g])
    if not val:
        table = _tabulate(cases, pool, manifest)
        fold = set(_fold(table, config, seed, manifest.source))
        val = sorted(i for g in fold for i in table.members[g])
        pool = sorted(i for g in range(len(table.members)) if g not in fold for i in table.members[g])
    return Splits(train=tuple(pool), val=tuple(val), test=tuple(test))


def _refuse_leaks(cases: Sequence[Case], parts: dict[str, list[int]]) -> None:
    sides: dict[str, set[str]] = {}
    for name, indices in parts.items():
        for i in indices:
            sides.setdefault(cases[i].group, set()).add(name)
    leaks = sorted(group for group, where in sides.items() if len(where) > 1)
    if leaks:
        shown = ", ".join(f"{group} ({' and '.join(sorted(sides[group]))})" for group in leaks[:5])
        raise LeakError(
            f"{len(leaks)} patient(s) stand on two sides of the given split (blank counts as train): {shown}"
            f"{', …' if len(leaks) > 5 else ''}. Give all cases of a patient the same split"
        )


def _tabulate(cases: Sequence[Case], pool: Sequence[int], manifest: Manifest) -> _Table:
    grouped: dict[str, list[int]] = {}
    for i in pool:
        grouped.setdefault(cases[i].group, []).append(i)
    names = sorted(grouped)
    sites = sorted({cases[i].site or "" for i in pool})
    n_classes = len(manifest.classes)
    counts = np.zeros((len(names), 1 + n_classes + len(sites)))
    for row, name in enumerate(names):
        for i in grouped[name]:
            counts[row, 0] += 1
            for label in _shown(cases[i]):
                if 0 <= label < n_classes:
                    counts[row, 1 + label] += 1
            counts[row, 1 + n_classes + sites.index(cases[i].site or "")] += 1
    weights = np.ones(counts.shape[1])
    weights[1 + n_classes :] = _SITE_WEIGHT
    return _Table(names, [grouped[name] for name in names], counts, weights, slice(1, 1 + n_classes))


def _shown(case: Case) -> Iterable[int]:
    """The classes that a case is known to show."""
    if case.label is None:
        return ()
    if isinstance(case.label, int):
        return (case.label,)
    return (k for k, present in enumerate(case.label) if present)


def _order(table: _Table, groups: Sequence[int], seed: int) -> list[int]:
    """The rarest and largest first: by the largest share that a group holds of any feature."""
    totals = np.maximum(table.counts[list(groups)].sum(axis=0), 1.0)
    share = (table.counts / totals * (table.weights == 1.0)).max(axis=1)

    def lot(group: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{table.names[group]}".encode(), digest_size=8).digest()

    return sorted(groups, key=lambda g: (-round(float(share[g]), 9), lot(g)))


def _deal(table: _Table, groups: Sequence[int], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Deal ``groups`` out to parts of the given shares (they sum to 1); with enough groups, no part stays empty."""
    share = np.asarray(shares)[:, None]
    targets = np.maximum(share * table.counts[list(groups)].sum(axis=0), 1e-9)  # (parts, features)
    held = np.zeros_like(targets)
    parts: list[list[int]] = [[] for _ in shares]
    order = _order(table, groups, seed)
    for done, group in enumerate(order):
        row = table.counts[group]
        cost = ((2 * (held - targets) * row + row**2) / targets) @ table.weights
        has = row[table.classes] > 0
        cost -= _COVER * ((held[:, table.classes] == 0) & has).sum(axis=1)
        empty = [k for k, part in enumerate(parts) if not part]
        allowed = empty if empty and len(order) - done <= len(empty) else range(len(parts))
        best = min(allowed, key=lambda k: (round(float(cost[k]), 9), k))
        parts[best].append(group)
        held[best] += row
    return parts


def _hold_back(table: _Table, share: float, seed: int, source: str) -> list[int]:
    """Groups for the test: about ``share`` of the cases; at least two groups, and two of each class, stay."""
    n = len(table.members)
    if share >= 1.0:
        raise DataError(f"{source}: split.test={share} holds every case back. It must be below 1; 0.15 is usual")
    if n < 4:  # a test of one patient measures nothing, and would take a third of what there is to learn from
        return []
    carriers = table.carriers(range(n))
    scarce = (carriers > 0) & (carriers <= 2)
    free = [g for g in range(n) if not (table.counts[g, table.classes][scarce] > 0).any()]
    if len(free) < 2:
        return []
    aim = share * table.counts[:, 0].sum() / table.counts[free, 0].sum()
    held = _deal(table, free, (1 - min(aim, 0.95), min(aim, 0.95)), seed)[1]
    spare = n - len(held)
    if spare < 2:
        held = held[: n - 2]
    for k in np.flatnonzero(carriers > 2):  # two groups of each class have to stay for training and validation
        shown = [g for g in held if table.counts[g, table.classes][k] > 0]
        for g in shown[: max(0, len(shown) - (int(carriers[k]) - 2))]:
            held.remove(g)
    return held


def _fold(table: _Table, config: SplitConfig, seed: int, source: str) -> list[int]:
    """Groups of fold ``config.fold``."""
    n = len(table.members)
    if n < 2:
        raise DataError(
            f"{source}: {n} patient (or case without one) is left to train and validate on, two are needed. "
            "Add cases, or lower split.test"
        )
    carriers = table.carriers(range(n))
    lone = carriers == 1
    free = [g for g in range(n) if not (table.counts[g, table.classes][lone] > 0).any()]
    if not free:
        free = list(range(n))  # every group is the only one of its class: one of them has to validate
    keeps_back = len(free) < n
    folds = min(config.folds, len(free))
    if config.fold >= folds and not (folds == 1 and config.fold == 0):
        raise DataError(
            f"{source}: fold {config.fold} of {config.folds} would be empty, since only {len(free)} patient(s) can "
            f"validate. Set split.fold below {folds}, or add cases"
        )
    if folds == 1:
        return free if keeps_back else free[:1]
    return _deal(table, free, [1 / folds] * folds, seed + 1)[config.fold]
