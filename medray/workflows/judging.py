"""How a model is judged: while it trains (cheaply, on the prepared grid), and at the end (on the image's own grid)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.learn.metrics import dice_per_class, mean_over_cases
from medray.predict.predictor import Callback, Floats, probabilities
from medray.predict.sliding import classify, load_libraries, segment
from medray.predict.torch_runtime import TorchPredictor
from medray.tasks.catalogue import find_task
from medray.train.precision import resolve_precision
from medray.train.runtime import Runtime
from medray.workflows.examples import Examples

Validate = Callable[[nn.Module], dict[str, float]]

GLANCE = 16
"""Cases that a validation segments while training goes on."""


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
    kind: str,
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
    logits (N, O), where the task isn't dense.
    """
    task = find_task(kind)
    if task.dense:
        indices = spread(indices, GLANCE)
        load_libraries()  # or fit() would take their import for the cost of a validation
        mine = [indices[row] for row in runtime.share(range(len(indices)))]
        shown = examples.choose(mine) if examples is not None and runtime.is_main else None

        def validate_masks(model: nn.Module) -> dict[str, float]:
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

        return validate_masks

    def validate_whole(model: nn.Module) -> dict[str, float]:
        predictor = predictor_of(model, experiment, runtime.device)
        logits = np.zeros((len(indices), task.outputs(num_classes)))
        mine = runtime.share(range(len(indices)))
        if mine:
            arrays = np.stack([np.asarray(store.image(indices[row]), dtype=np.float32) for row in mine])
            flips = experiment.augment.flip_axes if experiment.inference.tta else ()
            logits[list(mine)] = classify(predictor, arrays, flip_axes=flips)
        logits = runtime.reduce({"logits": logits})["logits"]
        if predictions is not None and runtime.is_main:
            predictions(indices, logits)
        targets = np.asarray([store.label(index) for index in indices])
        found = task.measures(targets, probabilities(logits, kind))
        return {f"val/{name}": value for name, value in found.items()}

    return validate_whole
