"""Multilabel: any number of labels for an image, each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from medray.config.schema import LossConfig
from medray.errors import ModelError
from medray.learn.activations import sigmoid
from medray.learn.losses import IGNORE, Binary, Loss
from medray.learn.metrics import binary_auc, entropy, macro, multilabel_metrics
from medray.tasks.classification import TASK as CLASSIFICATION
from medray.tasks.task import BuildLoss, Direction, Floats, Form, Question, Task

__all__ = ["TASK", "Multilabel"]

Array = npt.NDArray[Any]


def _bce(config: LossConfig, _: int, weights: Tensor | None) -> Loss:
    return Binary(IGNORE, weights, smoothing=config.label_smoothing)


def _focal(config: LossConfig, _: int, weights: Tensor | None) -> Loss:
    return Binary(IGNORE, weights, smoothing=config.label_smoothing, gamma=config.gamma)


class Multilabel(Task):
    """The answers are no and yes, (B, 2, K), of each label."""

    name = "multilabel"
    description = "several labels for an image"
    target: ClassVar[Form] = "labels"
    losses: ClassVar[Mapping[str, BuildLoss]] = {"bce": _bce, "focal": _focal}
    metrics: ClassVar[Mapping[str, Direction]] = CLASSIFICATION.metrics
    evaluated = CLASSIFICATION.evaluated
    guarded = ("auc",)
    thresholds = True
    rare_weigh_more = False
    fewest_classes = 1

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)

    def logits(self, log_probabilities: Tensor) -> Tensor:
        return log_probabilities[:, 1] - log_probabilities[:, 0]

    def probabilities(self, logits: Array) -> Floats:
        return sigmoid(logits)

    def decide(self, probabilities: Array, thresholds: Sequence[float] | None = None) -> npt.NDArray[np.int64]:
        if thresholds is not None and probabilities.shape[-1] != len(thresholds):
            raise ModelError(f"{len(thresholds)} thresholds for {probabilities.shape[-1]} labels: give one a label")
        return (probabilities >= (0.5 if thresholds is None else np.asarray(thresholds))).astype(np.int64)

    def calibration(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Each label is a two-class problem: softmax over (0, z) is the logistic function of z."""
        return np.stack([np.zeros(logits.size), logits.ravel()], axis=1), targets.ravel()

    def uncertainty(self, probabilities: Floats) -> float:
        return float(entropy(np.stack([probabilities, 1 - probabilities])).mean())

    def measures(
        self, targets: Array, probabilities: Array, thresholds: Sequence[float] | None = None
    ) -> dict[str, float]:
        return multilabel_metrics(targets, probabilities, 0.5 if thresholds is None else np.asarray(thresholds))

    def measure(self, metric: str, *arrays: Array) -> float:
        return macro(binary_auc, *arrays) if metric == "auc" else super().measure(metric, *arrays)

    def confident(self, targets: Array, probabilities: Array) -> tuple[Array, Array]:
        return probabilities.ravel(), (targets > 0).ravel().astype(float)

    def questions(self, targets: Array, probabilities: Array, classes: Sequence[str]) -> list[Question]:
        return [Question(name, targets[:, k] > 0, probabilities[:, k]) for k, name in enumerate(classes)]


TASK = Multilabel()
