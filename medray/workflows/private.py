"""Train one Experiment under differential privacy: plan the noise, reserve it, train, say what was spent, settle."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.manifest import Manifest
from medray.errors import PrivacyError
from medray.learn.metrics import dice_per_class
from medray.predict.predictor import probabilities
from medray.predict.sliding import classify
from medray.privacy.accountant import Mechanism, PrivacyPlan, plan_privacy
from medray.privacy.figures import private_mean
from medray.privacy.ledger import Ledger, Reservation
from medray.privacy.runtime import PrivateRuntime
from medray.privacy.statement import Statement, statement
from medray.tasks.catalogue import find_task
from medray.train.precision import resolve_device
from medray.workflows.judging import Validate, predictor_of, segment_prepared

__all__ = ["PrivateRun", "begin", "private_validate"]

FILE = "privacy.json"


@dataclass(frozen=True, kw_only=True)
class PrivateRun:
    """A run whose privacy is reserved.

    Attributes:
        reservation: of ``ledger``; both None without one.
    """

    plan: PrivacyPlan
    runtime: PrivateRuntime
    ledger: Ledger | None
    reservation: Reservation | None

    @property
    def steps(self) -> int:
        """Made so far, those of earlier sittings too."""
        return self.runtime.done + self.runtime.steps

    def statement(self, figures: Sequence[str]) -> Statement:
        """What the run may say of itself, once it has ended."""
        return statement(
            self.plan,
            steps=self.steps,
            figures=tuple(figures),
            mode=self.runtime.mode,
            secure=self.runtime.config.secure,
            ledger=self.ledger is not None,
        )

    def settle(self) -> None:
        """Give back to the ledger what was not done."""
        if self.ledger is not None and self.reservation is not None:
            self.ledger.settle(self.reservation, steps_done=[*(n for _, _, n in self.plan.released), self.steps])


def begin(experiment: Experiment, manifest: Manifest, indices: Sequence[int], directory: Path) -> PrivateRun:
    """Fix the noise for the whole run, and reserve what it will spend; where it was begun in ``directory``, go on.

    Steps whose result a crash lost were never released: a run that goes on makes them again within its reservation.

    Args:
        experiment: with ``privacy.epsilon``.
        indices: of the training cases.
        directory: of this run; ``privacy.json`` there names the reservation.

    Raises:
        PrivacyError: the target can't be held, or the ledger refuses.
    """
    config, train = experiment.privacy, experiment.train
    groups = [manifest.cases[i].group for i in indices]
    units = len(set(groups)) if config.unit == "patient" else len(indices)
    released: list[Mechanism] = [] if config.metric_noise is None else [(config.metric_noise, 1.0, 1)]
    plan = plan_privacy(
        config,
        units=units,
        batch_size=train.batch_size,
        steps=train.epochs * math.ceil(units * train.samples_per_case / train.batch_size),
        released=released,
    )
    ledger = None if config.ledger is None else Ledger(config.ledger)
    reservation = None if ledger is None else _reserve(ledger, plan, manifest, directory)
    runtime = PrivateRuntime(
        plan, config, device=resolve_device(experiment.device), groups=groups, seed=experiment.seed
    )
    return PrivateRun(plan=plan, runtime=runtime, ledger=ledger, reservation=reservation)


def _reserve(ledger: Ledger, plan: PrivacyPlan, manifest: Manifest, directory: Path) -> Reservation:
    path = directory / FILE
    if path.is_file():
        try:
            begun = ledger.find(str(json.loads(path.read_text(encoding="utf-8"))["reservation"]))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise PrivacyError(f"{path}: unreadable ({error}). Delete it, and the run reserves anew") from None
        if begun is not None and begun.history == tuple(plan.history):
            return begun
    reservation = ledger.reserve(run=directory.name, history=plan.history, data=manifest.source)
    partial = path.with_name(f"{FILE}.part")
    partial.write_text(json.dumps({"reservation": reservation.id, "ledger": str(ledger.path)}), encoding="utf-8")
    partial.replace(path)
    return reservation


def private_validate(
    run: PrivateRun,
    store: PreparedStore,
    indices: Sequence[int],
    experiment: Experiment,
    manifest: Manifest,
) -> Validate:
    """A function of the model that fit() calls, once, in the end: the released figure, with noise; NaN for none."""
    kind, classes = manifest.task, len(manifest.classes)
    name, noise = find_task(kind).private_objective[0], experiment.privacy.metric_noise
    groups = [manifest.cases[i].group for i in indices] if experiment.privacy.unit == "patient" else None

    def validate(model: nn.Module) -> dict[str, float]:
        if noise is None or not len(indices):
            return {name: math.nan}
        scores = _scores(model, store, indices, experiment, kind, classes, run.runtime)
        return {name: private_mean(scores, groups, noise, run.runtime.random)}

    return validate


def _scores(
    model: nn.Module,
    store: PreparedStore,
    indices: Sequence[int],
    experiment: Experiment,
    kind: str,
    classes: int,
    runtime: PrivateRuntime,
) -> Any:
    """One in 0..1 for each case, (N,)."""
    predictor = predictor_of(model, experiment, runtime.device)
    if find_task(kind).dense:
        scores = np.ones(len(indices))
        for row, index in enumerate(indices):
            labels = segment_prepared(predictor, store.image(index), experiment).argmax(axis=0)
            mask = store.mask(index)
            assert mask is not None
            dice = dice_per_class(labels, np.asarray(mask), classes)
            if np.isfinite(dice).any():
                scores[row] = float(np.nanmean(dice))
        return scores
    arrays = np.stack([np.asarray(store.image(index), dtype=np.float32) for index in indices])
    flips = experiment.augment.flip_axes if experiment.inference.tta else ()
    probability = probabilities(classify(predictor, arrays, flip_axes=flips), kind)
    return find_task(kind).correct(np.asarray([store.label(index) for index in indices]), probability)
