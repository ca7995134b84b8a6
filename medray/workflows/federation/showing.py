"""What a federation's rounds come to in a report: curves, rounds, settings, the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from medray.config.schema import Experiment
from medray.learn.intervals import Interval
from medray.privacy.central import plan_central
from medray.report.data import Interval as Shown
from medray.report.federation import RoundRow
from medray.workflows.federation.rounds import Federated

__all__ = ["aggregation", "central", "curves", "headline_of", "kept_at_sites", "round_row", "settings", "shown"]

NAMED = 12
"""Tensors that a report names."""


def shown(found: Interval) -> Shown:
    """An interval as the report takes it."""
    return Shown(value=found.value, low=found.low, high=found.high)


def headline_of(strategy: str, sites: int, metric: str, value: float, where: str) -> str:
    """One line, of a federation whose server has no cases of its own."""
    found = f"{value:.3f}" if math.isfinite(value) else "not told by any site"
    return f"{strategy} over {sites} sites: {metric} {found} on {where}"


def curves(
    names: Sequence[str], history: Sequence[Mapping[str, Any]], key: str
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Of each site, the metric of the global weights on its validation cases, over rounds that they have seen."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for entry in history:
        for name, row in entry["sites"].items():
            value = (row.get("metrics") or {}).get(key)
            if value is not None and row["state"] == "ok":
                found[name].append((float(entry["round"] - 1), float(value)))
        for name, metrics in (entry.get("last") or {}).get("sites", {}).items():
            if key in metrics:
                found[name].append((float(entry["round"]), float(metrics[key])))
    return {name: tuple(points) for name, points in found.items()}


def round_row(entry: Mapping[str, Any]) -> RoundRow:
    """A row of the report, from an entry of the rounds' history."""

    def named(state: str) -> tuple[str, ...]:
        return tuple(
            name if not row.get("reason") else f"{name}: {row['reason']}"
            for name, row in entry["sites"].items()
            if row["state"] == state
        )

    return RoundRow(
        number=int(entry["round"]),
        ok=len(named("ok")),
        late=named("late"),
        failed=named("failed"),
        quarantined=named("quarantined"),
        attempts=int(entry["attempts"]),
        seconds=float(entry["seconds"]),
        down=int(entry["down"]),
        up=int(entry["up"]),
        discarded=entry.get("discarded"),
    )


def central(experiment: Experiment) -> str:
    """What noise at the server promises; said aloud. Empty without any."""
    config = experiment.federation.privacy
    if not config.on:
        return ""
    plan = plan_central(config, experiment.federation.rounds)
    how = f"following the {config.quantile:g} quantile of norms, privately, from" if config.adaptive else "at"
    return (
        f"The server added noise for whole sites: epsilon {plan.epsilon:.3f} at delta {plan.delta:g} for one site, its "
        f"updates replaced by none, over all {plan.rounds} rounds, by the {plan.accountant.upper()} accountant; "
        f"updates clipped {how} {config.clip_norm:g}, noise multiplier {plan.noise_multiplier:.4g} a round, from a "
        "cryptographic generator. This holds for whoever sees the model; the server is trusted with what came before "
        "the noise. No figure measured at a site left it. Not covered: who takes part, and what the plan was made from."
    )


def aggregation(experiment: Experiment) -> str:
    """What the server saw of the sites' updates; said aloud."""
    if not experiment.federation.secure_aggregation:
        return "No secure aggregation: the server sees each site's update."
    return (
        "Secure aggregation (Bonawitz et al. 2017): of a round's updates the server learns the sum, over three sites "
        "at least, and no single one. It takes the quorum, and more than half of the sites that trained, to open it. "
        "What the sums of several rounds tell together, it does not hide."
    )


def kept_at_sites(own: Sequence[str]) -> str:
    """What never left the sites of the network itself; said aloud. Empty where all is shared."""
    if not own:
        return ""
    return (
        f"{len(own)} of the network's tensors stay at the sites and were seen by nobody else; what was shared is no "
        "model without them. Each site has its own, in its own folder: this server has none."
    )


def settings(
    experiment: Experiment,
    federated: Federated,
    seconds: float,
    machine: str,
    *,
    sites: str,
    own: Sequence[str] = (),
) -> dict[str, str]:
    """What decided the rounds, and what they took.

    Args:
        experiment: of all sites.
        federated: what the rounds came to.
        seconds: wall clock.
        machine: where the server ran.
        sites: where they come from, in a few words.
        own: names of the weights that stay there.
    """
    federation, shared = experiment.federation, federated.weights
    local = (
        f"{federation.local_epochs} epoch(s)" if federation.local_steps is None else f"{federation.local_steps} steps"
    )
    found = {
        "Strategy": federation.strategy,
        "Network": f"{experiment.model.name}, {sum(v.size for v in shared.values()):,} shared weights",
        "Rounds": f"{federation.rounds} of {local} at each site; best after {federated.best_round}",
        "Quorum, deadline": f"{federation.quorum} updates, {federation.deadline:g} s",
        "Compression": federation.compression,
        "Secure aggregation": "yes" if federation.secure_aggregation else "no",
        "Sites from": sites,
        "Wall clock": f"{seconds:.0f} s",
        "Machine": machine,
        "PyTorch": torch.__version__,
    }
    if own:
        found["Stay at the sites"] = ", ".join(own[:NAMED]) + (f" and {len(own) - NAMED} more" if own[NAMED:] else "")
    if federation.strategy == "fedprox":
        found["Proximal mu"] = f"{federation.proximal_mu:g}"
    return found
