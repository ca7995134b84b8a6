"""How a simulation deals the patients of one data set out to sites."""

from __future__ import annotations

import numpy as np

from medray.config.federation import PartitionConfig
from medray.data.manifest import Case, Manifest
from medray.errors import DataError, LeakError

__all__ = ["deal_out"]


def deal_out(manifest: Manifest, config: PartitionConfig) -> dict[str, tuple[int, ...]]:
    """Indices into ``manifest.cases`` by the name of a site; every case has one, and no patient has two.

    dirichlet: of each class, sites get shares drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv:1909.06335); a
    patient counts for its first case's class. quantity: sites get shares of the patients drawn likewise. Each site gets
    two patients at least.

    Raises:
        DataError: fewer than two sites, a case without one, or too few patients.
        LeakError: a patient stands at two sites.
    """
    if config.by == "site":
        return _by_site(manifest)
    groups: dict[str, list[int]] = {}
    for index, case in enumerate(manifest.cases):
        groups.setdefault(case.group, []).append(index)
    names = sorted(groups)
    if len(names) < 2 * config.sites:
        raise DataError(
            f"{manifest.source}: {len(names)} patients can't be dealt out to {config.sites} sites with two each. "
            "Lower federation.partition.sites"
        )
    rng = np.random.default_rng(config.seed)
    dealt: list[list[str]] = [[] for _ in range(config.sites)]
    strata: dict[str, list[str]] = {}
    for name in names:
        key = _class(manifest.cases[groups[name][0]]) if config.by == "dirichlet" else ""
        strata.setdefault(key, []).append(name)
    for _, members in sorted(strata.items()):
        order = [members[k] for k in rng.permutation(len(members))]
        shares = rng.dirichlet([config.alpha] * config.sites)
        edges = np.round(np.cumsum(shares) * len(order)).astype(int)
        for site, part in enumerate(np.split(np.array(order, dtype=object), edges[:-1])):
            dealt[site] += part.tolist()
    for poor in dealt:
        while len(poor) < 2:
            poor.append(max(dealt, key=len).pop())
    width = len(str(config.sites))
    return {
        f"site-{number + 1:0{width}d}": tuple(sorted(index for name in part for index in groups[name]))
        for number, part in enumerate(dealt)
    }


def _class(case: Case) -> str:
    return str(case.label)


def _by_site(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    homes: dict[str, str] = {}
    for index, case in enumerate(manifest.cases):
        if not case.site:
            raise DataError(
                f"{manifest.source}: case {case.id} names no site. Give the data a column 'site', or let "
                "federation.partition.by=dirichlet or quantity deal the cases out"
            )
        found.setdefault(case.site, []).append(index)
        if case.patient and homes.setdefault(case.patient, case.site) != case.site:
            raise LeakError(
                f"{manifest.source}: patient {case.patient} stands at {homes[case.patient]} and at {case.site}: one "
                "could train on what the other tests. Give the patient one site, or each site names of its own"
            )
    if len(found) < 2:
        raise DataError(f"{manifest.source}: all cases are of site {next(iter(found))}; a federation needs two sites")
    return {name: tuple(indices) for name, indices in sorted(found.items())}
