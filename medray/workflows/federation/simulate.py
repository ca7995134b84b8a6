"""``medray federate simulate``: a federation of sites that all lie here, from data to report and bundle."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medray.config.compose import Composed, compose
from medray.config.schema import Experiment, SplitConfig
from medray.data.checks import check, require_sound
from medray.data.fingerprint import Fingerprint
from medray.data.fingerprint_merge import merge_fingerprints
from medray.data.layouts import build_manifest
from medray.data.manifest import Case, Manifest, Split
from medray.data.partition import deal_out
from medray.data.splits import make_splits
from medray.engines.flower.parcel import Hub, Parcel
from medray.engines.ray.session import ray_session, usable_cpus
from medray.errors import ConfigError, FederationError, PrivacyError
from medray.tasks.catalogue import find_task
from medray.train.precision import resolve_device
from medray.workflows.events import Observer, StudyEvent
from medray.workflows.federation.conclude import Concluded, Ended, conclude
from medray.workflows.federation.rounds import RECORD, Federated, Rounds
from medray.workflows.federation.shared import arrays_of, own_names, shared_names, statistics_of
from medray.workflows.federation.site import SiteFolder, opener
from medray.workflows.federation.surveying import asked_of, survey
from medray.workflows.planning import default_cache, dump
from medray.workflows.recipe import Recipe
from medray.workflows.sitting import Sitting, sitting
from medray.workflows.training import new_model

__all__ = ["Engine", "checked", "prepare_sites", "run_rounds", "simulate_federation"]

Engine = Literal["auto", "here", "ray"]
LOT = "lot.json"
"""How the cases of a run were dealt out; its presence says that the sites' folders are whole."""
SMALL = 2_000_000
"""Parameters up to which sites are called one after the other in this process: starting others would cost more."""
PATIENCE = 300.0
"""Seconds that sites may take to come up."""


def simulate_federation(
    path: Path | None,
    overrides: Sequence[str],
    *,
    out: Path,
    resume: bool = False,
    engine: Engine = "auto",
    compare: bool = True,
    address: str | None = None,
    command: str = "",
    observer: Observer | None = None,
) -> Concluded:
    """Deal the cases out, train in rounds, compare, report, bundle.

    Args:
        path: an ``experiment.yaml``; None plans one for ``data=...``, or takes a resumed run's own where no override
            is given either.
        overrides: ``federation.strategy=fedprox`` and such.
        out: folder of the run.
        resume: go on where a run in ``out`` stopped.
        engine: where sites work: ``here``, one after the other; ``ray``, several at once; ``auto`` by the network's
            size.
        compare: also train each site alone, and one model on all data together.
        address: of a Ray cluster, for ``ray``.
        command: as it was typed, for the report.
        observer: hears of progress.

    Raises:
        ConfigError: ``out`` holds a run already and ``resume`` is off, or a field is refused.
        DataError: the cases can't be dealt out.
        FederationError: the rounds can't go on.
    """
    if (out / RECORD).exists() and not resume:
        raise ConfigError(f"{out} holds a federation already. Go on with it by --resume, or choose another with --out")
    if resume and path is None and not overrides and (out / "experiment.yaml").is_file():
        path = out / "experiment.yaml"
    composed = compose(path, overrides)
    with sitting(out, "train", observer=observer) as notify:
        started = time.monotonic()
        recipe, folders = prepare_sites(composed, out, _Stages(notify, started))
        experiment = checked(recipe.experiment(), composed.explicit)
        metric, direction = find_task(recipe.manifest.task).objective
        stage = _Stages(notify, started, metric)
        notify.measures(metric, direction)
        (out / "experiment.yaml").write_text(dump(experiment), encoding="utf-8")
        asked = replace_recipe(recipe, out)
        federated = _on_engine(asked, experiment, folders, out, stage, engine, address)
        result = conclude(
            Ended(
                directory=out,
                recipe=recipe,
                experiment=experiment,
                folders=folders,
                federated=federated,
                command=command,
                started=started,
            ),
            compare=compare,
            stage=stage,
        )
        notify(StudyEvent(kind="done", text=result.headline, elapsed=time.monotonic() - started))
        return result


@dataclass(frozen=True)
class _Stages:
    """Tells the observer what is going on."""

    notify: Sitting
    started: float
    metric: str = ""

    def __call__(self, text: str, kind: Literal["stage", "note"] = "stage") -> None:
        self.notify(StudyEvent(kind=kind, text=text, elapsed=time.monotonic() - self.started))

    def round(self, number: int, entry: Mapping[str, Any], of: int) -> None:
        """One round is over."""
        by_state: dict[str, list[str]] = {}
        for name, row in entry["sites"].items():
            by_state.setdefault(row["state"], []).append(name)
        bad = [f"{state}: {', '.join(names)}" for state, names in sorted(by_state.items()) if state != "ok"]
        if "discarded" in entry:
            bad.append("discarded")
        text = f"round {number} of {of}, {len(by_state.get('ok', []))} sites" + "".join(f"; {part}" for part in bad)
        losses = [row["loss"] for row in entry["sites"].values() if row.get("loss") is not None]
        metrics = {self.metric: entry["metrics_before"][self.metric]} if self.metric in entry["metrics_before"] else {}
        if losses:
            metrics["train/loss"] = sum(losses) / len(losses)
        self.notify(
            StudyEvent(
                kind="trial-progress",
                trial=0,
                text=text,
                fraction=number / of,
                metrics=metrics,
                elapsed=time.monotonic() - self.started,
            )
        )


def replace_recipe(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with absolute folders: actors have other working directories than we."""
    return replace(recipe, directory=str(out.resolve()), cache=str(Path(recipe.cache).resolve()))


def checked(experiment: Experiment, explicit: Mapping[str, Any]) -> Experiment:
    """The experiment, where a site can train it.

    Args:
        experiment: planned.
        explicit: what somebody set of it.

    Raises:
        ConfigError: it asks for something that a federation can't give.
    """
    if experiment.privacy.on:
        _check_privacy(experiment, explicit)
    if experiment.federation.strategy == "scaffold":
        _check_corrected(experiment)
    if experiment.schedule.name == "plateau":
        raise ConfigError(
            "schedule.name=plateau listens to validations, of which a site has none while it trains in a federation. "
            "Choose cosine, poly, cyclic, warm_restarts or constant"
        )
    if experiment.augment.adaptive:
        raise ConfigError(
            "augment.adaptive follows validations, of which a site has none in a federation. Set it to false"
        )
    return experiment


def _check_corrected(experiment: Experiment) -> None:
    """Refuse training from whose way the mean gradient can't be told."""
    optim = experiment.optim
    if optim.name != "sgd" or optim.momentum > 0 or experiment.privacy.on:
        raise ConfigError(
            f"federation.strategy=scaffold tells a site's mean gradient from how far plain SGD went; this is "
            f"optim.name={optim.name}, optim.momentum={optim.momentum:g}"
            f"{', with privacy.epsilon' if experiment.privacy.on else ''}. Set optim.name=sgd and optim.momentum=0, "
            "and leave privacy.epsilon out, or choose fedavg or fedprox"
        )


def _check_privacy(experiment: Experiment, explicit: Mapping[str, Any]) -> None:
    """Refuse what would let private figures out beside the training."""
    preprocess = explicit.get("preprocess") or {}
    charged = experiment.federation.fingerprint_epsilon is not None
    if experiment.preprocess.normalize == "columns" and not charged and not {"mean", "std"} <= preprocess.keys():
        raise PrivacyError(
            "preprocess.normalize=columns would take the columns' means and deviations from private data, uncharged. "
            "Give public constants, one a channel, in preprocess.mean and preprocess.std, or have the sites tell them "
            "with noise: federation.fingerprint_epsilon"
        )
    if experiment.privacy.ledger is not None:
        raise PrivacyError("privacy.ledger is a hospital's; a simulation has none. Leave it out")


# -- the sites
# -----------------------------------------------------------------------------------------------------------------


def prepare_sites(composed: Composed, out: Path, stage: Any) -> tuple[Recipe, tuple[SiteFolder, ...]]:
    """Deal the cases out to folders ``sites/NAME``, and make one plan from what the sites say of their data.

    Each site's cases are split by themselves, grouped by patient. In ``out`` lies the manifest of all, which no site
    sees: it is there to measure a simulation.

    Returns:
        the recipe of all cases together, and the sites.
    """
    explicit = composed.explicit
    source = str(explicit.get("data") or Experiment().data)
    folders_file = out / "sites"
    cache = str(default_cache().resolve())
    sections = {name: explicit.get(name) or {} for name in ("federation", "split")}
    asked = Experiment.model_validate({"data": source, **sections})
    split, partition = asked.split, asked.federation.partition
    dealing = {"data": source, "split": split.model_dump(), "partition": partition.model_dump()}
    surveyed = asked_of(explicit) if asked.federation.fingerprint_epsilon is not None else None
    if surveyed is not None:
        dealing |= {"fingerprint": surveyed.privacy.model_dump()}
    lot = json.dumps(dealing, indent=1)
    if (out / LOT).is_file():
        if (out / LOT).read_text(encoding="utf-8") != lot:
            raise ConfigError(
                f"{out}: its cases were dealt out by other settings of data, split or federation.partition. Give the "
                "same as before, or choose another folder with --out"
            )
    else:
        stage(f"checking {source}")
        task = str((explicit.get("task") or {}).get("kind", "auto"))
        manifest = check(build_manifest(source, task=task))
        require_sound(manifest)
        dealt = deal_out(manifest, partition)
        shutil.rmtree(folders_file, ignore_errors=True)
        stage(f"measuring {len(dealt)} sites, each by itself")
        cases: list[Case] = []
        placed: list[SiteFolder] = []
        for number, (name, indices) in enumerate(dealt.items()):
            own = _own_manifest(manifest, name, indices, split)
            folder = folders_file / f"{number:03d}"
            own.save(folder / "manifest.json")
            cases += own.cases
            placed.append(SiteFolder(name=name, directory=str(folder.resolve()), cache=cache))
        merged = _measured(tuple(placed), surveyed, stage)
        for number in range(len(dealt)):
            merged.save(folders_file / f"{number:03d}" / "fingerprint.json")
        manifest.model_copy(update={"cases": tuple(cases)}).save(out / "manifest.json")
        merged.save(out / "fingerprint.json")
        (out / LOT).write_text(lot, encoding="utf-8")
    folders = []
    for folder in sorted(folders_file.iterdir()):
        name = str(Manifest.load(folder / "manifest.json").cases[0].site)
        folders.append(SiteFolder(name=name, directory=str(folder.resolve()), cache=cache))
    return Recipe(directory=str(out), explicit=explicit, cache=cache), tuple(folders)


def _measured(folders: tuple[SiteFolder, ...], surveyed: Experiment | None, stage: Any) -> Fingerprint:
    """The fingerprint of all sites: from theirs, or out of sums with noise, as a run over a network would have it."""
    if surveyed is not None:
        from medray.engines.flower.inprocess import in_process

        hub, names = in_process(opener(folders), len(folders)), tuple(folder.name for folder in folders)
        with tempfile.TemporaryDirectory() as begun:  # after a crash the cases are dealt out, and asked for, anew
            return survey(hub, names, surveyed, Path(begun), authority=None, said=stage).fingerprint
    prints: list[tuple[str, Fingerprint]] = []
    for folder in folders:
        reply = folder.open()("query", Parcel(text={"ask": "fingerprint"}))
        prints.append((folder.name, Fingerprint.model_validate(reply.text["fingerprint"])))
    return merge_fingerprints(prints)


def _own_manifest(manifest: Manifest, name: str, indices: Sequence[int], split: SplitConfig) -> Manifest:
    """A site's own cases, with its own split written in."""
    cases = tuple(manifest.cases[index].model_copy(update={"site": name}) for index in indices)
    own = manifest.model_copy(update={"cases": cases, "findings": ()})
    parts = make_splits(own, split, split.seed)
    sides: dict[int, Split] = dict.fromkeys(parts.train, "train")
    sides |= dict.fromkeys(parts.val, "val")
    sides |= dict.fromkeys(parts.test, "test")
    return own.model_copy(
        update={"cases": tuple(case.model_copy(update={"split": sides[index]}) for index, case in enumerate(cases))}
    )


# -- the rounds
# ----------------------------------------------------------------------------------------------------------------


def run_rounds(
    hub: Hub, recipe: Recipe, experiment: Experiment, names: tuple[str, ...], out: Path, stage: _Stages
) -> Federated:
    """The server's part, with a hub to the sites."""
    model = new_model(experiment, recipe.manifest)
    shared = shared_names(model, experiment.federation)
    of = experiment.federation.rounds
    _await(hub, names)
    return Rounds(
        hub,
        out,
        experiment,
        arrays_of(model, shared),
        statistics_of(model),
        objective=find_task(recipe.manifest.task).objective,
        latest=bool(own_names(model, shared)),
        tell=lambda number, entry: stage.round(number, entry, of),
        note=lambda text: stage(text, "note"),
    ).run(names)


def _await(hub: Hub, names: tuple[str, ...]) -> None:
    """Wait until all sites are there: on Ray they come up after the server.

    Raises:
        FederationError: some are not there in time; they are named.
    """
    latest = time.monotonic() + PATIENCE
    while missing := sorted(set(names) - set(hub.sites())):
        if time.monotonic() > latest:
            raise FederationError(
                f"sites {', '.join(missing)} did not come up within {PATIENCE:.0f} s. Is there memory for them all?"
            )
        time.sleep(0.1)


def _on_engine(
    recipe: Recipe,
    experiment: Experiment,
    folders: tuple[SiteFolder, ...],
    out: Path,
    stage: _Stages,
    engine: Engine,
    address: str | None,
) -> Federated:
    names = tuple(folder.name for folder in folders)
    size = sum(p.numel() for p in new_model(experiment, recipe.manifest).parameters())
    if engine == "auto":
        engine = "here" if size <= SMALL and address is None else "ray"
    stage(f"{experiment.federation.strategy}: {experiment.model.name} at {len(names)} sites")
    opened = opener(folders)
    if engine == "here":
        from medray.engines.flower.inprocess import in_process

        return run_rounds(in_process(opened, len(names)), recipe, experiment, names, out, stage)
    from medray.engines.flower.simulation import simulate

    cpus = usable_cpus()
    at_once = max(1, min(len(names), cpus))
    on_gpu = resolve_device(experiment.device).type == "cuda"
    with ray_session(address=address, cpus=cpus, threads=max(1, cpus // at_once)) as session:
        return simulate(
            opened,
            len(names),
            lambda hub: run_rounds(hub, recipe, experiment, names, out, stage),
            cpus=max(1, cpus // at_once),
            gpus=session.gpus / at_once if on_gpu else 0.0,
        )
