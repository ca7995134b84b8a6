"""Segmentation: a class for each pixel or voxel, background first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy.typing as npt
from torch import Tensor

from medray.config.schema import LossConfig
from medray.learn.losses import IGNORE, Binary, Loss, NoisySoftmax, NoisySum, Overlap, Softmax, Sum
from medray.learn.metrics import mean_over_cases
from medray.tasks.task import BuildLoss, Direction, Form, Task

__all__ = ["TASK", "Segmentation"]

Array = npt.NDArray[Any]


def _dice(config: LossConfig, _: int, weights: Tensor | None) -> Overlap:
    return Overlap(IGNORE, weights, alpha=0.5, beta=0.5, over_batch=config.batch_dice)


def _tversky(config: LossConfig, _: int, weights: Tensor | None) -> Loss:
    return Overlap(IGNORE, weights, alpha=config.alpha, beta=config.beta, over_batch=config.batch_dice)


def _cross_entropy(config: LossConfig, _: int, weights: Tensor | None) -> Softmax:
    return Softmax(IGNORE, weights, smoothing=config.label_smoothing)


def _focal(config: LossConfig, _: int, weights: Tensor | None) -> Loss:
    return Softmax(IGNORE, weights, smoothing=config.label_smoothing, gamma=config.gamma)


def _bce(config: LossConfig, _: int, weights: Tensor | None) -> Loss:
    return Binary(IGNORE, weights, smoothing=config.label_smoothing)


def _dice_ce(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    return Sum(IGNORE, _dice(config, classes, weights), _cross_entropy(config, classes, weights))


def _heteroscedastic(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    return NoisySoftmax(IGNORE, weights, classes, smoothing=config.label_smoothing, samples=config.samples)


def _dice_heteroscedastic(config: LossConfig, classes: int, weights: Tensor | None) -> Loss:
    entropy = _cross_entropy(config, classes, weights)
    return NoisySum(IGNORE, _dice(config, classes, weights), entropy, classes, samples=config.samples)


class Segmentation(Task):
    name = "segmentation"
    description = "a class for each pixel or voxel"
    target: ClassVar[Form] = "mask"
    losses: ClassVar[Mapping[str, BuildLoss]] = {
        "dice_ce": _dice_ce,
        "dice": _dice,
        "cross_entropy": _cross_entropy,
        "focal": _focal,
        "tversky": _tversky,
        "bce": _bce,
        "heteroscedastic": _heteroscedastic,
        "dice_heteroscedastic": _dice_heteroscedastic,
    }
    metrics: ClassVar[Mapping[str, Direction]] = {"dice": "max"}
    guarded = ("dice",)
    private_metric = "dice"
    tie = None

    def measure(self, metric: str, *arrays: Array) -> float:
        return mean_over_cases(arrays[0])


TASK = Segmentation()
