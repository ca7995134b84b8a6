"""A champion, of a study or a federation, to a bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.errors import BundleError
from medray.learn.intervals import Interval
from medray.predict.postprocess import fit_thresholds
from medray.predict.predictor import probabilities
from medray.tasks.catalogue import find_task
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate, Scores
from medray.workflows.recipe import Recipe

__all__ = ["write_champion"]


def write_champion(
    directory: Path,
    recipe: Recipe,
    champion: Candidate,
    validation: Scores | None,
    *,
    name: str,
    temperature: float,
    metrics: Mapping[str, Interval],
    notes: Sequence[str],
) -> float:
    """Write the bundle of a champion to ``directory``.

    Args:
        directory: of the bundle.
        recipe: whence the data.
        champion: one network, or several.
        validation: of it, on validation cases; thresholds of several labels are fitted on them. None where there
            are no cases: every threshold is a half.
        name: shown in cards and answers.
        temperature: of the calibration.
        metrics: measured on the cases that the report names.
        notes: for the card, one sentence each.

    Returns:
        the seconds that it took.
    """
    lead, manifest = champion.lead.experiment, recipe.manifest
    task = find_task(manifest.task)
    thresholds = None
    if task.thresholds and validation is not None:
        assert validation.logits is not None and validation.targets is not None
        thresholds = fit_thresholds(probabilities(validation.logits, task.name, temperature), validation.targets)
    began = time.monotonic()
    write = partial(
        write_bundle,
        directory,
        kind=manifest.task,
        ndim=manifest.ndim,
        channels=manifest.channels,
        classes=manifest.classes,
        modality=manifest.modality,
        name=name,
        preprocess=lead.preprocess,
        inference=InferenceSpec(
            patch_size=lead.train.patch_size if task.dense else None,
            divisor=choosing.divisor_of(champion, manifest.ndim),
            overlap=lead.inference.overlap,
            batch_size=max(1, min(4, lead.train.batch_size)),
            flip_axes=lead.augment.flip_axes if lead.inference.tta else (),
            keep_largest=lead.inference.keep_largest,
        ),
        models=[member.model for member in champion.members],
        configs=[member.experiment.model for member in champion.members],
        weights=champion.weights,
        rule=champion.rule,
        temperature=temperature,
        thresholds=thresholds,
        experiment=lead,
        fingerprint=recipe.fingerprint,
        metrics={
            f"{key}{suffix}": None if not np.isfinite(value) else float(value)
            for key, found in metrics.items()
            for suffix, value in (("", found.value), ("_low", found.low), ("_high", found.high))
        },
    )
    try:
        write(notes=notes)
    except BundleError as error:
        # A model without ONNX can still be used by torch; a study that ends with nothing could not.
        write(notes=[*notes, f"No ONNX file: {error}"], onnx=False)
    return time.monotonic() - began
