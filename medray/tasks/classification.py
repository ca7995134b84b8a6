"""Classification: one class for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medray.config.schema import LossConfig
from medray.learn.losses import IGNORE, Binary, Loss, NoisySoftmax, Softmax
from medray.learn.metrics import binary_auc, classification_metrics, macro
from medray.tasks.task import BuildLoss, Direction, Form, Task

__all__ = ["TASK", "Classification"]

Array = npt.NDArray[Any]


def _ignore(classes: int) -> int:
    """No case of a classification is ignored, and of very many classes IGNORE is one."""
    return IGNORE if classes <= IGNORE else -100


def _cross_entropy(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    return Softmax(_ignore(classes), weights, smoothing=config.label_smoothing)


def _focal(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    return Softmax(_ignore(classes), weights, smoothing=config.label_smoothing, gamma=config.gamma)


def _bce(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    return Binary(_ignore(classes), weights, smoothing=config.label_smoothing)


def _heteroscedastic(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    return NoisySoftmax(_ignore(classes), weights, classes, smoothing=config.label_smoothing, samples=config.samples)


class Classification(Task):
    name = "classification"
    description = "one class for an image"
    target: ClassVar[Form] = "class"
    losses: ClassVar[Mapping[str, BuildLoss]] = {
        "cross_entropy": _cross_entropy,
        "focal": _focal,
        "bce": _bce,
        "heteroscedastic": _heteroscedastic,
    }
    metrics: ClassVar[Mapping[str, Direction]] = {
        "auc": "max",
        "accuracy": "max",
        "balanced_accuracy": "max",
        "f1": "max",
        "log_loss": "min",
        "brier": "min",
        "average_precision": "max",
    }
    evaluated = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1", "ece", "brier")
    guarded = ("auc", "accuracy")

    def measures(
        self, targets: Array, probabilities: Array, thresholds: Sequence[float] | None = None
    ) -> dict[str, float]:
        return classification_metrics(targets, probabilities)

    def measure(self, metric: str, *arrays: Array) -> float:
        if metric != "auc":
            return super().measure(metric, *arrays)
        targets, probabilities = arrays  # the one that is bootstrapped most: without the others
        truth = np.eye(probabilities.shape[1])[targets]
        shown = slice(1, 2) if probabilities.shape[1] == 2 else slice(None)
        return macro(binary_auc, truth[:, shown], probabilities[:, shown])


TASK = Classification()
