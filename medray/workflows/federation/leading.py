"""``medray federate run``: the server's part of a federation over a network.

The server has no data. What it plans with is a fingerprint: that of public or synthetic data, or the sum of what the
sites tell of theirs. What it can say of the result is what the sites said of their validation cases.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from medray.bundle.spec import INTENDED_USE
from medray.config.compose import compose
from medray.config.federation import FederationConfig
from medray.config.schema import Experiment
from medray.data.fingerprint import Fingerprint
from medray.data.fingerprint_merge import merge_fingerprints
from medray.data.manifest import Manifest
from medray.engines.flower.parcel import Hub, HubOf, Parcel, readable
from medray.engines.flower.superlink import NODES
from medray.errors import ConfigError, FederationError
from medray.learn.intervals import Interval
from medray.privacy.policy import recipe_digest
from medray.report.federation import ComparisonRow, FederationReport, SiteRow, write_federation_report
from medray.tasks.catalogue import find_task
from medray.workflows.champion import Candidate
from medray.workflows.federation.network import start_run
from medray.workflows.federation.rounds import Federated, Rounds
from medray.workflows.federation.shared import arrays_of, own_names, put, shared_names, statistics_of
from medray.workflows.federation.showing import (
    aggregation,
    central,
    curves,
    headline_of,
    kept_at_sites,
    round_row,
    settings,
    shown,
)
from medray.workflows.federation.simulate import checked
from medray.workflows.federation.surveying import asked_of, survey
from medray.workflows.packing import write_champion
from medray.workflows.planning import dump
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, new_model

__all__ = ["Asked", "lead", "run_federation"]

ASKED, SHARED, SURVEY = "asked.yaml", "shared.safetensors", "survey.txt"
APP = Path(__file__).parent / "app"
POLL_SECONDS = 2.0
LONGEST_LINE = 4000
"""Of the log, in characters."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run that was started.

    Attributes:
        number: Flower's.
        directory: where ``federation.json``, ``report.html`` and ``bundle/`` will lie, on the server.
        recipe: content hash that sites may allow; None where the plan waits for the sites' fingerprints.
    """

    number: str
    directory: Path
    recipe: str | None


def run_federation(
    federation: Path,
    path: Path | None,
    overrides: Sequence[str],
    *,
    out: Path,
    fingerprint: Path | None = None,
    resume: bool = False,
) -> Asked:
    """Start a run at a federation's server, on this machine.

    Args:
        federation: folder of ``medray federate provision``, whose server is up.
        path: an ``experiment.yaml``; None plans one from the fingerprint.
        overrides: ``federation.rounds=50`` and such.
        out: folder of the run.
        fingerprint: of public or synthetic data, as ``medray plan`` writes it; None asks the sites for theirs.
        resume: go on with a run in ``out``.

    Raises:
        ConfigError: ``out`` holds a run already and ``resume`` is off, or a field is refused.
        FederationError: the server isn't up, or the plan can't be shared as it says (``federation.local``, fedbn).
    """
    if (out / ASKED).exists() and not resume:
        raise ConfigError(f"{out} holds a run already. Go on with it by --resume, or choose another with --out")
    resumed = (out / ASKED).exists()
    explicit = _explicit(out) if resumed else compose(path, overrides).explicit
    if not resumed:
        explicit.pop("data", None)  # each site has its own
        out.mkdir(parents=True, exist_ok=True)
        (out / ASKED).write_text(yaml.safe_dump(explicit, sort_keys=False), encoding="utf-8")
    if fingerprint is not None:
        Fingerprint.load(fingerprint).save(out / "fingerprint.json")
    recipe = None
    if (out / "fingerprint.json").is_file():
        experiment = _experiment(out)
        recipe = recipe_digest(experiment)
        try:
            shared_names(new_model(experiment, _recipe(out).manifest), experiment.federation)
        except FederationError:
            if not resumed:
                (out / ASKED).unlink()  # nothing is in the way of another attempt
            raise
    register = (federation / "server" / "state" / NODES).resolve()
    number = start_run(federation, APP, {"directory": str(out.resolve()), "nodes": str(register)})
    return Asked(number=number, directory=out, recipe=recipe)


def lead(hub_of: HubOf, config: Mapping[str, object]) -> None:
    """Lead one run to its end; called on the server by Flower.

    Args:
        hub_of: makes a hub to the sites.
        config: ``directory`` of the run; ``nodes``, the file that says which node is which site.
    """
    directory, began = Path(str(config["directory"])), time.monotonic()
    try:
        register = Path(str(config["nodes"]))
        _lead(hub_of(_register(register)), directory, began, register.parent.parent / "ca.crt")
    except Exception as error:
        _write(directory / "failed.txt", f"{type(error).__name__}: {error}\n")
        raise


def _lead(hub: Hub, directory: Path, began: float, ca: Path) -> None:
    said = _Journal(directory / "run.log")
    asked = _federation(_explicit(directory))
    sites = _gathered(hub, asked.quorum, asked.deadline, said)
    if not (directory / "fingerprint.json").is_file():
        _measured(hub, sites, directory, ca, said)
    experiment = _experiment(directory)
    _write(directory / "experiment.yaml", dump(experiment))
    recipe = _recipe(directory)
    model = new_model(experiment, recipe.manifest)
    shared = shared_names(model, experiment.federation)
    said(f"recipe {recipe_digest(experiment)}: {experiment.model.name} at {', '.join(sites)}")
    federated = Rounds(
        hub,
        directory,
        experiment,
        arrays_of(model, shared),
        statistics_of(model),
        objective=find_task(recipe.manifest.task).objective,
        authority=ca.read_bytes() if experiment.federation.secure_aggregation else None,
        latest=bool(own_names(model, shared)),
        tell=lambda number, entry: said(_line(number, entry, experiment.federation.rounds)),
        note=said,
    ).run(sites)
    own = own_names(model, shared)
    put(model, dict(federated.weights))
    network = Network(model=model.eval(), experiment=experiment)
    headline = _conclude(directory, recipe, network, own, federated, began)
    said(headline)


def _explicit(directory: Path) -> dict[str, Any]:
    """What was asked for."""
    return yaml.safe_load((directory / ASKED).read_text(encoding="utf-8")) or {}


def _federation(explicit: Mapping[str, Any]) -> FederationConfig:
    return Experiment.model_validate({"federation": explicit.get("federation") or {}}).federation


def _register(path: Path) -> dict[int, str]:
    """Names of the sites by their nodes' numbers, as the server wrote them down when it let them in.

    Raises:
        FederationError: the file can't be read; then nobody could say who is who.
    """
    try:
        return {int(number): str(name) for name, number in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise FederationError(
            f"{path}: which node is which site can't be read ({error}). Start the federation's server again: medray "
            "federate server"
        ) from None


class _Journal:
    """``run.log``: what a person may follow while the run goes on. Each entry is one line, whatever a site wrote."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, text: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{now} {readable(text, LONGEST_LINE)}\n")


def _gathered(hub: Hub, quorum: int, deadline: float, said: Callable[[str], None]) -> tuple[str, ...]:
    """The sites that take part: all that are there once the quorum is."""
    until, before = time.monotonic() + deadline, -1
    while True:
        sites = hub.sites()
        if len(sites) >= quorum:
            time.sleep(POLL_SECONDS)  # who comes a moment later takes part too
            return hub.sites()
        if len(sites) != before:
            before = len(sites)
            said(f"waiting for {quorum} sites (federation.quorum); here: {', '.join(sites) or 'none'}")
        if time.monotonic() > until:
            raise FederationError(
                f"{len(sites)} of {quorum} sites (federation.quorum) came within {deadline:g} s "
                f"(federation.deadline): {', '.join(sites) or 'none'}. Are the others up? medray federate status"
            )
        time.sleep(POLL_SECONDS)


def _measured(hub: Hub, sites: tuple[str, ...], directory: Path, ca: Path, said: Callable[[str], None]) -> None:
    """``fingerprint.json`` of the sites' data: out of sums where they are to be protected, else of each site's own."""
    explicit = _explicit(directory)
    asked = _federation(explicit)
    if asked.secure_aggregation or asked.fingerprint_epsilon is not None:
        authority = ca.read_bytes() if asked.secure_aggregation else None
        found = survey(hub, sites, asked_of(explicit), directory, authority=authority, said=said)
        fingerprint, how = found.fingerprint, found.said
    else:
        fingerprint = _ask_for_fingerprints(hub, sites, asked.quorum, asked.deadline, said)
        how = "The plan was made from each site's own exact fingerprint, which the server saw."
    said(how)
    _write(directory / SURVEY, how)
    fingerprint.save(directory / "fingerprint.json")  # last: its presence says that nobody need be asked


def _ask_for_fingerprints(
    hub: Hub, sites: tuple[str, ...], quorum: int, deadline: float, said: Callable[[str], None]
) -> Fingerprint:
    question = Parcel(text={"ask": "fingerprint"})
    answers = hub.ask("query", dict.fromkeys(sites, question), deadline)
    found: list[tuple[str, Fingerprint]] = []
    refused = []
    for name in sites:
        answer = answers.get(name)
        reason = "no answer" if answer is None else answer.error
        if reason is None and answer is not None:
            try:
                found.append((name, Fingerprint.model_validate(answer.text.get("fingerprint"))))
                continue
            except ValueError as error:
                reason = f"no fingerprint ({error})"
        refused.append(f"{name}: {reason}")
        said(refused[-1])
    if len(found) < quorum:
        raise FederationError(
            f"{len(found)} of {quorum} fingerprints (federation.quorum). {'; '.join(refused)}. Plan on public data "
            "instead, and give that plan's with --fingerprint"
        )
    return merge_fingerprints(found)


def _experiment(directory: Path) -> Experiment:
    recipe = _recipe(directory)
    return checked(recipe.experiment(), recipe.explicit)


def _recipe(directory: Path) -> Recipe:
    """A recipe without cases: what the fingerprint says is all that the server knows."""
    found = Fingerprint.load(directory / "fingerprint.json")
    Manifest(
        source="federation",
        root="",
        task=found.task,
        ndim=found.ndim,
        channels=found.channels,
        classes=tuple(found.classes),
        modality=found.modality,
        cases=(),
    ).save(directory / "manifest.json")
    return Recipe(directory=str(directory), explicit=_explicit(directory), cache=str(directory / "cache"))


def _line(number: int, entry: Mapping[str, Any], of: int) -> str:
    troubles = [
        f"{name} {row['state']}: {row['reason']}" for name, row in entry["sites"].items() if row["state"] != "ok"
    ]
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in entry["metrics_before"].items())
    discarded = f"discarded: {entry['discarded']}" if "discarded" in entry else ""
    begin = f"round {number} of {of} in {entry['seconds']:.0f} s"
    return "; ".join(filter(None, [begin, discarded, metrics, *troubles]))


def _conclude(
    directory: Path, recipe: Recipe, network: Network, own: tuple[str, ...], federated: Federated, began: float
) -> str:
    """Bundle, report and ``outcome.json``; the headline.

    Where weights stay at the sites there is no bundle here, since the network would hold them untrained, but
    ``shared.safetensors``.
    """
    experiment = network.experiment
    metric = find_task(recipe.manifest.task).objective[0].removeprefix("val/")
    value = federated.metrics.get(f"val/{metric}", math.nan)
    figures = {
        name.removeprefix("val/"): Interval(value=found, low=math.nan, high=math.nan)
        for name, found in federated.metrics.items()
    }
    where = "validation cases as the sites stated them (optimistic: they chose the round)"
    names = sorted({name for entry in federated.history for name in entry["sites"]})
    planned = directory / SURVEY
    plan = planned.read_text(encoding="utf-8") if planned.is_file() else "The plan was made from no site's data."
    headline = headline_of(experiment.federation.strategy, len(names), metric, value, where)
    if own:
        _write(directory / SHARED, lambda path: save_file(dict(federated.weights), str(path)))
    else:
        note = f"Trained by {experiment.federation.strategy} over {len(names)} sites in {federated.best_round} rounds"
        write_champion(
            directory / "bundle",
            recipe,
            Candidate(name="federated", members=(network,)),
            None,
            name=directory.absolute().name,
            temperature=1.0,
            metrics=figures,
            notes=[note, "Not calibrated: the server has no cases"],
        )
    last = federated.history[-1]
    report = FederationReport(
        name=directory.absolute().name,
        headline=headline,
        intended_use=INTENDED_USE,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        metric=metric,
        measured_on=where,
        metrics={name: shown(found) for name, found in figures.items()},
        comparison=(
            (ComparisonRow(name="federated", score=shown(figures[metric]), difference=None),)
            if metric in figures
            else ()
        ),
        sites=tuple(_site_row(name, last, federated.history, metric) for name in names),
        matrix={},
        curves=curves(names, federated.history, f"val/{metric}"),
        rounds=tuple(round_row(entry) for entry in federated.history),
        best_round=federated.best_round,
        settings=settings(
            experiment, federated, time.monotonic() - began, recipe.machine.note, sites="the network", own=own
        ),
        protection=" ".join(
            filter(None, [PROTECTION, plan, aggregation(experiment), central(experiment), kept_at_sites(own)])
        ),
        reproduce={"experiment.yaml": dump(experiment), "Recipe": recipe_digest(experiment)},
    )
    write_federation_report(report, directory / "report.html")
    document = {
        "headline": headline,
        "metric": metric,
        "best_round": federated.best_round,
        "metrics": {name: found.value if np.isfinite(found.value) else None for name, found in figures.items()},
        "bundles": [] if own else [str(directory / "bundle")],
        "bytes": {way: sum(int(entry[way]) for entry in federated.history) for way in ("down", "up")},
    }
    _write(directory / "outcome.json", json.dumps(document, indent=1, allow_nan=False))
    return headline


PROTECTION = (
    "Each site decides what protection its updates leave with, in its own site.yaml, and its audit log says what it "
    "was. Updates travel by TLS."
)


def _site_row(name: str, last: Mapping[str, Any], history: Sequence[Mapping[str, Any]], metric: str) -> SiteRow:
    rows = [entry["sites"][name] for entry in history if name in entry["sites"]]
    cases = [int(row["cases"]) for row in rows if row.get("cases") is not None]
    judged = [int(row["judged"]) for row in rows if row.get("judged") is not None]
    value = ((last.get("last") or {}).get("sites", {}).get(name) or {}).get(f"val/{metric}", math.nan)
    return SiteRow(
        site=name,
        train=cases[-1] if cases else None,
        validation=judged[-1] if judged else None,
        test=0,
        score=shown(Interval(value=value, low=math.nan, high=math.nan)),
        rivals={},
    )


def _write(path: Path, content: str | Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".part")
    if isinstance(content, str):
        partial.write_text(content, encoding="utf-8")
    else:
        content(partial)
    partial.replace(path)
