"""The end of a simulated federation: what it came to, against each site alone and all data together.

Everything is measured on the sites' test cases, which were used for no choice; where there are none, on validation
cases, and called optimistic.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medray.bundle.spec import INTENDED_USE
from medray.config.privacy import PrivacyConfig
from medray.config.schema import Experiment
from medray.data.splits import Splits
from medray.learn.intervals import Interval
from medray.privacy.policy import recipe_digest
from medray.report.data import Interval as Shown
from medray.report.federation import AttackRow, ComparisonRow, FederationReport, SiteRow, write_federation_report
from medray.tasks.catalogue import find_task
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate, Scores
from medray.workflows.federation.keeping import kept_state, run_folder
from medray.workflows.federation.leaking import attacks
from medray.workflows.federation.rounds import Federated
from medray.workflows.federation.shared import own_names, put
from medray.workflows.federation.showing import aggregation, central, curves, round_row, settings, shown
from medray.workflows.federation.site import SiteFolder
from medray.workflows.packing import write_champion
from medray.workflows.planning import dump
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, new_model, train_model

__all__ = ["Concluded", "Ended", "conclude"]

FEDERATED, POOLED, LOCAL = "federated", "pooled", "each site alone"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A federation whose rounds are over."""

    directory: Path
    recipe: Recipe
    experiment: Experiment
    folders: tuple[SiteFolder, ...]
    federated: Federated
    command: str
    started: float


@dataclass(frozen=True, kw_only=True)
class Concluded:
    """What came of it.

    Attributes:
        metrics: of the federated model on all sites' test cases.
        comparison: the other ways to train, and the federated model minus each.
        bundles: one, or one a site where weights stay at the sites.
    """

    headline: str
    metric: str
    metrics: dict[str, Interval]
    comparison: dict[str, tuple[Interval, Interval]]
    report: Path
    bundles: tuple[Path, ...]


def conclude(ended: Ended, *, compare: bool, stage: Callable[[str], None]) -> Concluded:
    """Compare, measure, write ``bundle/``, ``report.html`` and ``outcome.json``.

    Args:
        ended: the rounds' result.
        compare: train the comparisons too.
        stage: told what is going on.
    """
    recipe, experiment = ended.recipe, ended.experiment
    metric = find_task(recipe.manifest.task).objective[0].removeprefix("val/")
    own = _site_models(ended)
    alone, pooled = _others(ended, stage) if compare else ({}, None)
    splits = recipe.splits(experiment)
    stage("measuring")
    candidates = {f"{FEDERATED}: {name}": network for name, network in own.items()}
    candidates |= {f"alone: {name}": network for name, network in alone.items()}
    if pooled is not None:
        candidates[POOLED] = pooled
    listed = [Candidate(name=name, members=(network,)) for name, network in candidates.items()]
    cases = splits.test or splits.val
    scores = choosing.score(recipe, listed, cases, metric=metric)
    homes = [str(recipe.manifest.cases[index].site) for index in cases]
    federated = _by_home(scores, homes, f"{FEDERATED}: ")
    rivals: dict[str, Scores] = {}
    if alone:
        rivals[LOCAL] = _by_home(scores, homes, "alone: ")
    if pooled is not None:
        rivals[POOLED] = scores[POOLED]
    metrics = federated.intervals()
    comparison = {name: (found.interval(), choosing.difference(federated, found)) for name, found in rivals.items()}
    where = "test" if splits.test else "validation (optimistic: these cases chose the round)"
    headline = _headline(ended, metric, metrics[metric], comparison, len(cases), where)
    stage("writing the bundle")
    bundles = _bundles(ended, own, metric, metrics, splits.val)
    report = ended.directory / "report.html"
    page = _report(ended, headline, metric, metrics, federated, rivals, comparison, scores, homes, where)
    stage("asking the model who was in its training")
    write_federation_report(_attacked(page, lambda: _attacks(ended, own, pooled, splits, metric)), report)
    result = Concluded(
        headline=headline, metric=metric, metrics=metrics, comparison=comparison, report=report, bundles=bundles
    )
    _save(result, ended)
    return result


def _attacked(page: FederationReport, attack: Callable[[], tuple[AttackRow, ...]]) -> FederationReport:
    """The page with what an attack found, or with the reason why there is none: it costs nobody the report."""
    try:
        return replace(page, attacks=attack())
    except Exception as error:  # whatever it comes to, all else has been measured
        why = f"{type(error).__name__}: {error}".rstrip(".")
        return replace(page, protection=f"{page.protection} What the model gives away was not tried: {why}.")


def _attacks(
    ended: Ended, own: dict[str, Network], pooled: Network | None, splits: Splits, metric: str
) -> tuple[AttackRow, ...]:
    """What the federated model leaks, and beside it the one of all data, which knows no privacy."""
    models = {FEDERATED: own} | ({} if pooled is None else {POOLED: dict.fromkeys(own, pooled)})
    privacy = {FEDERATED: ended.experiment.privacy, POOLED: PrivacyConfig()}
    unseen, seed = splits.test or splits.val, ended.experiment.seed
    return attacks(ended.recipe, models, splits.train, unseen, metric=metric, privacy=privacy, seed=seed)


# -- the models
# ----------------------------------------------------------------------------------------------------------------


def _site_models(ended: Ended) -> dict[str, Network]:
    """The federated model as each site has it: with its own weights where some stay there, else one for all."""
    found: dict[str, Network] = {}
    one: Network | None = None
    for folder in ended.folders:
        model = new_model(ended.experiment, ended.recipe.manifest)
        private = bool(own_names(model, ended.federated.weights))
        if one is not None and not private:
            found[folder.name] = one
            continue
        if private:
            kept = run_folder(Path(folder.directory), recipe_digest(ended.experiment), ended.federated.run)
            newest = kept_state(kept)
            model.load_state_dict(newest.get("own", {}), strict=False)
        put(model, dict(ended.federated.weights))
        found[folder.name] = one = Network(model=model.eval(), experiment=ended.experiment)
    return found


def _others(ended: Ended, stage: Callable[[str], None]) -> tuple[dict[str, Network], Network]:
    """Each site by itself, and all data together, for as many passes as the federation made."""
    experiment, recipe = ended.experiment, ended.recipe
    alone: dict[str, Network] = {}
    for folder in ended.folders:
        stage(f"comparing: {folder.name} alone")
        own = Recipe(directory=folder.directory, explicit=recipe.explicit, cache=folder.cache, machine=recipe.machine)
        count = len(own.splits(experiment).train)
        alone[folder.name] = train_model(own, _as_long(experiment, count), Path(folder.directory) / "alone")
    stage("comparing: all data together")
    count = len(recipe.splits(experiment).train)
    return alone, train_model(recipe, _as_long(experiment, count), ended.directory / POOLED)


def _as_long(experiment: Experiment, cases: int) -> Experiment:
    federation, train = experiment.federation, experiment.train
    epochs = federation.rounds * federation.local_epochs
    if federation.local_steps is not None:
        steps = math.ceil(cases * train.samples_per_case / train.batch_size)
        epochs = math.ceil(federation.rounds * federation.local_steps / steps)
    length: dict[str, Any] = {"epochs": max(1, epochs), "budget": None, "workers": 1, "min_workers": None}
    # The comparisons are what could be had without privacy.
    return experiment.model_copy(update={"train": train.model_copy(update=length), "privacy": PrivacyConfig()})


# -- figures
# -------------------------------------------------------------------------------------------------------------------


def _by_home(scores: dict[str, Scores], homes: Sequence[str], prefix: str) -> Scores:
    """Each case judged by its own site's model."""
    first = scores[prefix + homes[0]]
    rows = list(enumerate(homes))
    if first.task.dense:
        dice = [scores[prefix + home].dice for home in homes]
        return replace(first, dice=np.stack([table[row] for (row, _), table in zip(rows, dice, strict=True)]))  # type: ignore[index]
    logits = [scores[prefix + home].logits for home in homes]
    return replace(first, logits=np.stack([table[row] for (row, _), table in zip(rows, logits, strict=True)]))  # type: ignore[index]


def _part(scores: Scores, rows: Sequence[int]) -> Scores:
    """Some of the cases."""
    chosen = np.asarray(rows)
    changes: dict[str, Any] = {"indices": tuple(scores.indices[r] for r in rows), "groups": scores.groups[chosen]}
    if scores.task.dense:
        assert scores.dice is not None
        return replace(scores, dice=scores.dice[chosen], **changes)
    assert scores.logits is not None and scores.targets is not None
    return replace(scores, logits=scores.logits[chosen], targets=scores.targets[chosen], **changes)


def _headline(
    ended: Ended,
    metric: str,
    found: Interval,
    comparison: dict[str, tuple[Interval, Interval]],
    cases: int,
    where: str,
) -> str:
    name, sites = ended.experiment.federation.strategy, len(ended.folders)
    text = f"{name} over {sites} sites: {metric} {_interval(found)} on {cases} {where} cases"
    for rival, (_, difference) in comparison.items():
        text += f"; {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}) over {rival}"
    return text


def _interval(found: Interval) -> str:
    return f"{found.value:.3f} (95 % CI {found.low:.3f} to {found.high:.3f})"


def _bundles(
    ended: Ended, own: dict[str, Network], metric: str, metrics: dict[str, Interval], val: Sequence[int]
) -> tuple[Path, ...]:
    recipe, federation = ended.recipe, ended.experiment.federation
    networks = list(own.values())
    personal = len({id(network) for network in networks}) > 1
    notes = [f"Trained by {federation.strategy} over {len(own)} sites in {ended.federated.best_round} rounds"]
    private = ended.experiment.privacy.on or federation.privacy.on
    if private:
        notes.append("Its metrics and thresholds were measured in a simulation and are not private; the weights are")
    written = []
    for folder, network in zip(ended.folders, networks, strict=True):
        candidate = Candidate(name=FEDERATED, members=(network,))
        mine = [i for i in val if not personal or recipe.manifest.cases[i].site == folder.name] or list(val)
        validation = choosing.score(recipe, [candidate], mine, metric=metric)[FEDERATED]
        directory = ended.directory / "bundle" if not personal else Path(folder.directory) / "bundle"
        write_champion(
            directory,
            recipe,
            candidate,
            validation,
            name=f"{ended.directory.absolute().name}{f'-{folder.name}' if personal else ''}",
            temperature=1.0 if private else choosing.temperature_of(validation),
            metrics=metrics,
            notes=[*notes, *([f"Some weights are of {folder.name} alone; they fit no other site"] if personal else [])],
        )
        written.append(directory)
        if not personal:
            break
    return tuple(written)


# -- the report
# ----------------------------------------------------------------------------------------------------------------


def _report(
    ended: Ended,
    headline: str,
    metric: str,
    metrics: dict[str, Interval],
    federated: Scores,
    rivals: dict[str, Scores],
    comparison: dict[str, tuple[Interval, Interval]],
    scores: dict[str, Scores],
    homes: Sequence[str],
    where: str,
) -> FederationReport:
    names = [folder.name for folder in ended.folders]
    rows_of = {name: [row for row, home in enumerate(homes) if home == name] for name in names}
    sites = []
    for name in names:
        manifest = [case for case in ended.recipe.manifest.cases if case.site == name]
        counts = {side: sum(case.split == side for case in manifest) for side in ("train", "val", "test")}
        rows = rows_of[name]
        sites.append(
            SiteRow(
                site=name,
                train=counts["train"],
                validation=counts["val"],
                test=counts["test"],
                score=shown(_part(federated, rows).interval()) if rows else Shown(value=math.nan),
                rivals={rival: shown(_part(s, rows).interval()) for rival, s in rivals.items()} if rows else {},
            )
        )
    models = {FEDERATED: federated, **({POOLED: rivals[POOLED]} if POOLED in rivals else {})}
    models |= {f"{name} alone": scores[f"alone: {name}"] for name in names if f"alone: {name}" in scores}
    matrix = {
        model: tuple(_part(found, rows_of[name]).value if rows_of[name] else math.nan for name in names)
        for model, found in models.items()
    }
    history = ended.federated.history
    return FederationReport(
        name=ended.directory.absolute().name,
        headline=headline,
        intended_use=INTENDED_USE,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        metric=metric,
        measured_on=where,
        metrics={name: shown(found) for name, found in metrics.items()},
        comparison=(
            ComparisonRow(name=FEDERATED, score=shown(metrics[metric]), difference=None),
            *(
                ComparisonRow(name=name, score=shown(score), difference=shown(difference))
                for name, (score, difference) in comparison.items()
            ),
        ),
        sites=tuple(sites),
        matrix=matrix,
        curves=curves(names, history, f"val/{metric}"),
        rounds=tuple(round_row(entry) for entry in history),
        best_round=ended.federated.best_round,
        settings=settings(
            ended.experiment,
            ended.federated,
            time.monotonic() - ended.started,
            ended.recipe.machine.note,
            sites=ended.experiment.federation.partition.by,
            own=own_names(new_model(ended.experiment, ended.recipe.manifest), ended.federated.weights),
        ),
        protection=_protection(ended.experiment),
        reproduce={"Command": ended.command, "experiment.yaml": dump(ended.experiment)},
    )


def _protection(experiment: Experiment) -> str:
    """How what left the sites was protected; said aloud."""
    privacy, seen = experiment.privacy, aggregation(experiment)
    if experiment.federation.privacy.on:
        return (
            f"{central(experiment)} {seen} The figures of this page were measured here, in a simulation, and are not "
            "private; the comparisons were trained without privacy."
        )
    if not privacy.on and experiment.federation.secure_aggregation:
        return f"{seen} There was no differential privacy: the sums, and the model, may tell of the cases."
    if not privacy.on:
        return (
            "The updates of this federation left the sites as they were: no differential privacy and no secure "
            "aggregation. Whoever sees them may learn about the cases that they were made from."
        )
    return (
        f"Each site trained by DP-SGD: epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each {privacy.unit}, "
        f"added or removed, over all rounds, accounted by {privacy.accountant}. No figure measured at a site left it. "
        f"The number of training cases of a site, the shapes, and the classes count as public. {seen} "
        "The figures of this page were measured here, in a simulation, and are not private; the comparisons were "
        "trained without privacy."
    )


def _save(result: Concluded, ended: Ended) -> None:
    """``outcome.json``, for programs: null where there is no figure."""

    def figures(found: Interval) -> list[float | None]:
        return [float(v) if math.isfinite(v) else None for v in found]

    document = {
        "headline": result.headline,
        "metric": result.metric,
        "best_round": ended.federated.best_round,
        "metrics": {name: figures(found) for name, found in result.metrics.items()},
        "comparison": {
            name: {"score": figures(score), "difference": figures(difference)}
            for name, (score, difference) in result.comparison.items()
        },
        "bundles": [str(path) for path in result.bundles],
        "bytes": {way: sum(int(entry[way]) for entry in ended.federated.history) for way in ("down", "up")},
    }
    partial = ended.directory / "outcome.json.part"
    partial.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    partial.replace(ended.directory / "outcome.json")
