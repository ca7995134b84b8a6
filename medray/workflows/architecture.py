"""The phase before a study's trials that searches for a network: ``study.nas``.

    runs/<study>/nas/
      checkpoint.pt     from which an interrupted search goes on
      genotype.json     the best cells: model.name=genotype:runs/<study>/nas/genotype.json
      result.json       all that is handed on, and the history
      cells.svg         a picture of the cells

It sees the training cases alone, in two halves: one for the weights of the super-network, one for the choice of
operations. Validation and test cases stay what they are for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from medray import logs
from medray.config.genotype import Genotype
from medray.config.schema import Experiment, NasConfig, SplitConfig
from medray.data.loader import train_loader
from medray.data.manifest import Manifest
from medray.data.splits import make_splits
from medray.engines.ray.remote import call_all
from medray.errors import ConfigError, MedrayError, StudyError
from medray.models.catalogue import lookup
from medray.models.cells import Plan
from medray.report.cells import draw_cells
from medray.search.nas.draw import random_genotype
from medray.search.nas.loop import Found, load_found, search
from medray.search.nas.strategies import strategy
from medray.search.nas.strategy import Problem
from medray.search.nas.supernet import SuperNetwork
from medray.tasks.catalogue import build_loss, find_task
from medray.train.precision import lay_out, resolve_device, resolve_precision
from medray.train.progress import Progress
from medray.train.runtime import LocalRuntime, Runtime
from medray.workflows.recipe import Recipe
from medray.workflows.training import open_store, outputs

__all__ = ["SEARCHED", "SearchTask", "check", "filled", "find", "run_search", "search_experiment", "share", "stand_in"]

SEARCHED = "searched"
"""What ``space.model.name`` calls that which the phase will find."""
NAME = "model.name"
VOXELS = {2: 64 * 64, 3: 24**3}
"""The largest patch of a segmentation's search: the super-network computes all operations at once."""
DEPTH = {"classification": 2, "segmentation": 3}
"""Levels of the super-network, at most; the cells are the same at all."""
_PLAIN_LOSS = {"heteroscedastic": "cross_entropy", "dice_heteroscedastic": "dice_ce"}


def check(nas: NasConfig, space: Mapping[str, Any]) -> None:
    """Refuse a search that no trial could profit from, and a space that waits for one.

    Raises:
        ConfigError: says what to add.
    """
    rule = space.get(NAME)
    choices = rule.get("choice") if isinstance(rule, Mapping) else None
    waits = isinstance(choices, list | tuple) and SEARCHED in choices
    if nas.strategy is None:
        if waits:
            raise ConfigError(
                f"space.{NAME}: '{SEARCHED}' is what an architecture search finds, and there is none: set "
                "study.nas.strategy=darts (or enas), or name a network"
            )
        return
    strategy(nas.strategy)
    if not waits:
        raise ConfigError(
            f"study.nas.strategy={nas.strategy} finds a network that no trial could choose: add '{SEARCHED}' to "
            f"space.{NAME}.choice"
        )


def share(nas: NasConfig) -> float:
    """Of the study's budget, for the search; none where there is none."""
    return 0.0 if nas.strategy is None else nas.share


def filled(space: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The space with what was found in place of ``searched``, in conditions too."""

    def replaced(value: Any) -> list[Any]:
        values = value if isinstance(value, list | tuple) else [value]
        return [one for given in values for one in (names if given == SEARCHED else [given])]

    full: dict[str, Any] = {}
    for path, rule in space.items():
        full[path] = rule
        if not isinstance(rule, Mapping):
            continue
        if path == NAME and isinstance(rule.get("choice"), list | tuple):
            full[path] = {**rule, "choice": replaced(rule["choice"])}
        when = rule.get("when")
        if isinstance(when, Mapping) and NAME in when:
            full[path] = {**full[path], "when": {**when, NAME: replaced(when[NAME])}}
    return full


def kind_of(manifest: Manifest) -> str:
    """Which networks of cells do the task."""
    return "segmentation" if find_task(manifest.task).dense else "classification"


def stand_in(manifest: Manifest, nas: NasConfig) -> Genotype:
    """A genotype of the size that will be found: a space is tried, and its fields are planned, with it.

    Raises:
        ConfigError: the data are no images.
    """
    if manifest.columns:
        raise ConfigError(
            f"study.nas.strategy={nas.strategy}: cells are for images, {manifest.source} is a table. Leave study.nas "
            "out"
        )
    return random_genotype(kind_of(manifest), nas.nodes, 0)


@dataclass(frozen=True, kw_only=True)
class SearchTask:
    """One architecture search.

    Attributes:
        recipe: whence the data and the plan.
        nas: how to search.
        directory: of the search alone.
        seconds: wall clock of all its sittings.
        seed: of the study.
        workers: processes that search together.
        cpus: that they share.
        gpus: of each.
    """

    recipe: Recipe
    nas: NasConfig
    directory: str
    seconds: float
    seed: int = 0
    workers: int = 1
    cpus: int = 1
    gpus: int = 0


def find(task: SearchTask, *, while_waiting: Callable[[], None]) -> Found:
    """Search in a worker process, which leads a group where several search together. Ray must be connected.

    Raises:
        StudyError: it failed, and why.
    """
    alone = task.workers == 1
    try:
        (found,) = call_all(
            run_search,
            [task],
            cpus=task.cpus if alone else 0,
            gpus=task.gpus if alone else 0,
            while_waiting=while_waiting,
        )
    except MedrayError as error:
        raise StudyError(
            f"the architecture search failed: {error}\nA resumed study would go the same way: begin a new one with "
            "other settings of study.nas, or one without"
        ) from error
    return found


def run_search(task: SearchTask) -> Found:
    """Search in this process, or lead a group that does; one that has ended is read.

    Raises:
        StudyError, DataError, ConfigError: what can't be searched, and why.
    """
    directory = Path(task.directory)
    directory.mkdir(parents=True, exist_ok=True)
    logs.bind(final=directory.name)
    found = load_found(directory)
    if found is None:
        experiment = search_experiment(task.recipe, task.nas)
        open_store(task.recipe, experiment)
        if task.workers > 1:
            _search_together(task)
        else:
            _search(task, LocalRuntime(resolve_device(experiment.device)), lambda _: False)
        found = load_found(directory)
        if found is None:
            raise StudyError(f"{directory}: the architecture search ended without a result")
    picture = directory / "cells.svg"
    if not picture.exists():
        picture.write_text(draw_cells(found.genotypes[0]), encoding="utf-8")
    return found


def _search_together(task: SearchTask) -> None:
    from medray.engines.ray.train import GroupSize, run_group

    size = GroupSize(workers=task.workers, cpus=max(1, task.cpus // task.workers), gpus=task.gpus, sync_batchnorm=False)
    run_group(_search, task, size)


def _search(task: SearchTask, runtime: Runtime, _report: Callable[[Progress], bool]) -> None:
    """Search, alone or as one of a group."""
    recipe, nas, manifest = task.recipe, task.nas, task.recipe.manifest
    experiment = search_experiment(recipe, nas)
    store, kind, classes = open_store(recipe, experiment), manifest.task, len(manifest.classes)
    halves = halve(manifest, recipe.splits(experiment).train, experiment.split.seed)
    loaders = [train_loader(store, half, experiment, kind=kind, num_classes=classes, workers=0) for half in halves]
    if not runtime.is_alone:
        processes = int(runtime.reduce({"n": 1.0})["n"])
        loaders = [loader.shard(runtime.lane, processes) for loader in loaders]
    torch.manual_seed(task.seed)
    net = SuperNetwork(kind_of(manifest), super_plan(experiment, manifest, nas))
    make = strategy(str(nas.strategy))
    # On a CPU bf16 is slower here: hundreds of small operations, each with its casts. Finite differences drown in it.
    precise = runtime.device.type == "cpu" or nas.order == "second"
    precision = "fp32" if precise else resolve_precision(experiment.train.precision, runtime.device)
    lay_out(net, runtime.device, precision)
    net.to(runtime.device).train()
    problem = Problem(
        net=net,
        criterion=runtime.criterion(build_loss(experiment.loss, kind=kind, num_classes=classes)),
        runtime=runtime,
        precision=precision,
        config=nas,
        seed=task.seed,
    )
    search(
        problem,
        make,
        train=loaders[0],
        held=loaders[1],
        directory=Path(task.directory),
        asked=_digest(experiment, nas),
        seconds=task.seconds,
        steps=nas.steps,
    )


def search_experiment(recipe: Recipe, nas: NasConfig) -> Experiment:
    """How images reach the super-network: as they will reach the discrete one, in smaller batches and patches."""
    own: dict[str, Any] = {NAME: stand_in(recipe.manifest, nas).name}
    dense = find_task(recipe.manifest.task).dense
    if not dense:
        own |= {"train.mixup": 0.0, "train.cutmix": 0.0}
    experiment = recipe.experiment(own)
    train, loss = experiment.train, experiment.loss
    changed: dict[str, Any] = {"batch_size": min(train.batch_size, nas.batch_size), "micro_batch": None, "workers": 1}
    if train.patch_size is not None and dense:
        changed["patch_size"] = _smaller(
            train.patch_size,
            lookup(experiment.model.name).smallest(
                experiment.model.model_copy(update={"depth": DEPTH["segmentation"]}), recipe.manifest.ndim
            ),
        )
        if changed["patch_size"] != train.patch_size:
            share = math.prod(train.patch_size) / math.prod(changed["patch_size"])
            changed["samples_per_case"] = min(64, max(1, round(train.samples_per_case * share)))
            changed["foreground"] = max(train.foreground, 0.33)
    return experiment.model_copy(
        update={
            "train": train.model_copy(update=changed),
            "loss": loss.model_copy(update={"name": _PLAIN_LOSS.get(loss.name, loss.name)}),
        }
    )


def _smaller(patch: tuple[int, ...], least: int) -> tuple[int, ...]:
    """Halve the longest axis until the patch is small enough; each stays a multiple of half of ``least``."""
    sides, unit = list(patch), max(1, least // 2)
    while math.prod(sides) > VOXELS[len(sides)]:
        longest = max(range(len(sides)), key=lambda axis: sides[axis])
        half = max(least, -(-sides[longest] // (2 * unit)) * unit)
        if half >= sides[longest]:
            break
        sides[longest] = half
    return tuple(sides)


def super_plan(experiment: Experiment, manifest: Manifest, nas: NasConfig) -> Plan:
    """Size of the super-network."""
    kind = kind_of(manifest)
    size = experiment.train.patch_size or experiment.preprocess.size
    depth = lookup(experiment.model.name).resolved_depth(experiment.model, manifest.ndim)
    return Plan(
        ndim=manifest.ndim,
        in_channels=manifest.channels,
        num_outputs=outputs(manifest),
        nodes=nas.nodes,
        width=nas.feature_size,
        depth=min(depth, DEPTH[kind]),
        extent=max(size) if size else None,
    )


def halve(manifest: Manifest, indices: Sequence[int], seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Training cases for weights and for architecture: patients whole, classes and sites alike in both."""
    cases = tuple(manifest.cases[index].model_copy(update={"split": None}) for index in indices)
    part = manifest.model_copy(update={"cases": cases})
    splits = make_splits(part, SplitConfig(folds=2, test=0.0), seed)
    return tuple(indices[i] for i in splits.train), tuple(indices[i] for i in splits.val)


def _digest(experiment: Experiment, nas: NasConfig) -> str:
    content = [cast("Any", experiment).model_dump(mode="json"), nas.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
