"""What this machine needs for a step and for a case, measured before a study shares out its time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from medray.config.schema import Experiment
from medray.data.loader import train_loader
from medray.errors import NonFiniteLossError, OutOfMemoryError
from medray.learn.optimizers import build_optimizer
from medray.tasks.catalogue import build_loss
from medray.train.precision import lay_out, resolve_device, resolve_precision
from medray.train.runtime import LocalRuntime
from medray.train.step import Stepper
from medray.workflows import champion as choosing
from medray.workflows.costs import untrained
from medray.workflows.judging import spread
from medray.workflows.recipe import Recipe
from medray.workflows.training import new_model, open_store

PATIENCE = 5.0
"""Seconds after which no further case is timed: a large network is timed well enough by one."""


def time_case(
    recipe: Recipe, experiment: Experiment, indices: Sequence[int], metric: str, *, repeats: int = 3
) -> float:
    """Seconds that scoring one case by an experiment's network takes here: the fastest of some, untrained.

    Args:
        recipe: of the study.
        experiment: whose network.
        indices: of cases to choose from.
        metric: the study's objective without its ``val/``.
        repeats: cases, at most.
    """
    candidate, fastest, spent = untrained(recipe, experiment), math.inf, 0.0
    for index in spread(indices, repeats):
        began = time.monotonic()
        choosing.score(recipe, [candidate], [index], metric=metric, distances=True)
        took = time.monotonic() - began
        fastest, spent = min(fastest, took), spent + took
        if spent > PATIENCE:
            break
    return fastest


def time_step(recipe: Recipe, *, threads: int, repeats: int = 3) -> float | None:
    """Seconds of one optimiser step of the default here, its batch included: the fastest of some, after a warm-up.

    None where a step fails.

    Args:
        recipe: of the study.
        threads: that a trial computes with.
        repeats: steps that are timed.
    """
    experiment, manifest = recipe.experiment(), recipe.manifest
    kind, classes, store = manifest.task, len(manifest.classes), open_store(recipe, experiment)
    loader = train_loader(store, recipe.splits(experiment).train, experiment, kind=kind, num_classes=classes, workers=0)
    runtime, model = LocalRuntime(resolve_device(experiment.device)), new_model(experiment, manifest).train()
    precision = resolve_precision(experiment.train.precision, runtime.device)
    channels_last = lay_out(model, runtime.device, precision)
    model.to(runtime.device)
    stepper = Stepper(
        model,
        build_optimizer(model, experiment.optim),
        build_loss(experiment.loss, kind=kind, num_classes=classes),
        runtime=runtime,
        precision=precision,
        # One at a time where nobody knows yet how many fit: slower, so a cautious answer.
        micro_batch=1 if experiment.train.micro_batch == "auto" else experiment.train.micro_batch,
        clip_norm=experiment.optim.clip_norm,
        channels_last=channels_last,
    )
    endless = (batch for _ in iter(int, 1) for batch in loader)
    for group in stepper.optimizer.param_groups:
        group["lr"] = 0.0  # what is timed shall not diverge
    before, fastest = torch.get_num_threads(), math.inf
    torch.set_num_threads(threads)
    try:
        for number in range(repeats + 1):
            began = time.monotonic()
            stepper(next(endless), place=lambda: "the timing of a step")
            fastest = min(fastest, time.monotonic() - began) if number else fastest
    except (NonFiniteLossError, OutOfMemoryError):
        return None  # the first trial will say so, with all that a trial says
    finally:
        torch.set_num_threads(before)
        del stepper, model
        if runtime.device.type == "cuda":  # the trials need it
            torch.cuda.empty_cache()
    return fastest
