"""How a model is judged: while it trains (cheaply, on the prepared grid), and at the end (on the image's own grid)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.manifest import TaskKind
from medray.learn.metrics import (
    binary_auc,
    classification_metrics,
    dice_per_class,
    macro,
    mean_over_cases,
    multilabel_metrics,
)
from medray.predict.predictor import Callback, Floats, probabilities
from medray.predict.sliding import classify, load_libraries, segment
from medray.predict.torch_runtime import TorchPredictor
from medray.train.precision import resolve_precision
from medray.train.runtime import Runtime
from medray.workflows.examples import Examples

Direction = Literal["max", "min"]
Validate = Callable[[nn.Module], dict[str, float]]

CLASSIFICATION_METRICS = ("auc", "accuracy", "balanced_accuracy", "f1", "log_loss", "brier", "average_precision")
"""What may be an objective where classes are told."""

GLANCE = 16
"""Cases that a validation segments while training goes on."""

OBJECTIVE: dict[TaskKind, tuple[str, Direction]] = {
    "segmentation": ("val/dice", "max"),
    "classification": ("val/auc", "max"),
    "multilabel": ("val/auc", "max"),
}
"""What a study looks for unless told otherwise."""


def predictor_of(model: nn.Module, experiment: Experiment, device: torch.device) -> TorchPredictor:
    """The network as a function of arrays, in the precision that it trains in."""
    return TorchPredictor(model, device=device, precision=resolve_precision(experiment.train.precision, device))


def segment_prepared(predictor: Callback, array: Any, experiment: Experiment) -> Floats:
    """Probabilities (K, *spatial) of one prepared image (C, *spatial), by sliding window as the experiment says."""
    return segment(
        predictor,
        np.asarray(array, dtype=np.float32),
        patch_size=experiment.train.patch_size,
        overlap=experiment.inference.overlap,
        batch_size=max(1, min(4, experiment.train.batch_size)),
        flip_axes=experiment.augment.flip_axes if experiment.inference.tta else (),
    )


def spread(indices: Iterable[int], count: int) -> list[int]:
    """At most ``count`` of the indices, evenly spread."""
    chosen = list(indices)
    if len(chosen) <= count:
        return chosen
    return [chosen[i] for i in np.linspace(0, len(chosen) - 1, count).round().astype(int)]


def make_validate(
    store: PreparedStore,
    indices: Sequence[int],
    experiment: Experiment,
    *,
    kind: TaskKind,
    num_classes: int,
    runtime: Runtime,
    examples: Examples | None = None,
    predictions: Callable[[Sequence[int], npt.NDArray[Any]], None] | None = None,
) -> Validate:
    """A function of the model that fit() calls: ``val/...`` metrics over the validation cases.

    Processes that train together share the cases; what each found of a case is put together before anything is
    averaged, so that the metrics are those of one process.

    Of many cases to segment only some are looked at while training goes on: a validation that took a tenth of a short
    trial could not be repeated often enough to stop it early. The choice of the champion looks at all.

    ``examples`` is told what was found in one case, each time, by the main process; ``predictions`` the cases and their
    logits (N, K), of a classifier.
    """
    if kind == "segmentation":
        indices = spread(indices, GLANCE)
        load_libraries()  # or fit() would take their import for the cost of a validation
        mine = [indices[row] for row in runtime.share(range(len(indices)))]
        shown = examples.choose(mine) if examples is not None and runtime.is_main else None

        def validate_segmentation(model: nn.Module) -> dict[str, float]:
            predictor = predictor_of(model, experiment, runtime.device)
            rows = np.zeros((len(indices), num_classes - 1))
            for row in runtime.share(range(len(indices))):
                labels = segment_prepared(predictor, store.image(indices[row]), experiment).argmax(axis=0)
                mask = store.mask(indices[row])
                assert mask is not None
                if examples is not None and indices[row] == shown:
                    examples.take(indices[row], labels)
                rows[row] = dice_per_class(labels, np.asarray(mask), num_classes)
            value = mean_over_cases(runtime.reduce({"dice": rows})["dice"])
            return {"val/dice": value if np.isfinite(value) else 0.0}

        return validate_segmentation

    def validate_classification(model: nn.Module) -> dict[str, float]:
        predictor = predictor_of(model, experiment, runtime.device)
        logits = np.zeros((len(indices), num_classes))
        mine = runtime.share(range(len(indices)))
        if mine:
            arrays = np.stack([np.asarray(store.image(indices[row]), dtype=np.float32) for row in mine])
            flips = experiment.augment.flip_axes if experiment.inference.tta else ()
            logits[list(mine)] = classify(predictor, arrays, flip_axes=flips)
        logits = runtime.reduce({"logits": logits})["logits"]
        if predictions is not None and runtime.is_main:
            predictions(indices, logits)
        targets = np.asarray([store.label(index) for index in indices])
        found = all_metrics(kind, targets, probabilities(logits, kind))
        return {f"val/{name}": value for name, value in found.items()}

    return validate_classification


def all_metrics(kind: TaskKind, targets: npt.NDArray[Any], probability: npt.NDArray[Any]) -> dict[str, float]:
    """Every metric of a classification task: see :mod:`medray.learn.metrics`."""
    return (
        multilabel_metrics(targets, probability)
        if kind == "multilabel"
        else classification_metrics(targets, probability)
    )


def measure(kind: TaskKind, metric: str, *arrays: npt.NDArray[Any]) -> float:
    """One metric of some cases.

    Args:
        kind: of the task.
        metric: ``dice``, or a key of :func:`all_metrics`.
        arrays: (N, K - 1) Dice per class in segmentation; targets and probabilities (N, K) in classification.
    """
    if kind == "segmentation":
        return mean_over_cases(arrays[0])
    targets, probability = arrays
    if metric == "auc":  # the one that is bootstrapped most
        if kind == "multilabel":
            return macro(binary_auc, targets, probability)
        truth = np.eye(probability.shape[1])[targets]
        shown = slice(1, 2) if probability.shape[1] == 2 else slice(None)
        return macro(binary_auc, truth[:, shown], probability[:, shown])
    return all_metrics(kind, targets, probability)[metric]
