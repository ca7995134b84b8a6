"""Ordinal grading: one of K classes that have an order, such as the degrees of a disease.

CORN (Shi, Cao and Raschka, Deep neural networks for rank-consistent ordinal regression based on conditional
probabilities, 2023, arXiv:2111.08851): the network has K - 1 outputs, and the k-th says how probable a grade above k is
where it is not below k. Their products, the probabilities of a grade above k, fall with k whatever the network says,
so that no answer contradicts itself. The decision is the median grade: as many as are exceeded more likely than not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from medray.config.schema import LossConfig
from medray.errors import DataError
from medray.learn.losses import IGNORE, Loss, one_hot
from medray.learn.metrics import accuracy, balanced_accuracy, binary_auc, confusion_matrix, ece, log_loss
from medray.tasks.task import BuildLoss, Direction, Floats, Form, Question, Task

__all__ = ["TASK", "Corn", "Ordinal", "quadratic_kappa", "ranked_probability_score"]

Array = npt.NDArray[Any]
MOST = 100
"""Grades that numbers may span: a larger number is no grade."""


# -- the loss


class Corn(Loss):
    """Binary cross-entropy of each step, over the cases that reach it: logits (B, K - 1), grades (B,) or shares (B, K).

    A case of grade g passes the steps below g and stops at step g; its loss is their sum. The mean is over cases, each
    with the weight of its grade: were it over the steps reached, a case alone (as private training sees each) would
    count the less the higher its grade is. Smoothing makes each passing, and each stopping, that much less certain.
    """

    def __init__(self, ignore_index: int, weights: Tensor | None, *, smoothing: float = 0.0) -> None:
        super().__init__(ignore_index, weights)
        self.smoothing = smoothing

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        passed, stopped = self.steps(target, logits)
        reached = passed + stopped
        passed = (1 - self.smoothing) * passed + 0.5 * self.smoothing * reached
        value = -(passed * F.logsigmoid(logits) + (reached - passed) * F.logsigmoid(-logits)).sum()
        return value / self.shares(whole, logits).sum().clamp_min(1e-12)

    def steps(self, target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K - 1) each: the weight with which a case passes a step, and with which it stops there."""
        shares = self.shares(target, logits)
        return shares.sum(1, keepdim=True) - shares.cumsum(1)[:, :-1], shares[:, :-1]

    def shares(self, target: Tensor, logits: Tensor) -> Tensor:
        """(B, K): the weight of each case in each grade; none where the target is ignored."""
        shares = target
        if not target.is_floating_point():
            known = self.known(target)
            shares = one_hot(target.where(known, 0), logits.shape[1] + 1) * known.unsqueeze(1)
        return shares if self.weights is None else shares * self.weights


def _corn(config: LossConfig, _: int, weights: Tensor | None) -> Loss:
    return Corn(IGNORE, weights, smoothing=config.label_smoothing)


# -- metrics, of grades (N,) and probabilities (N, K)


def quadratic_kappa(grades: Array, decided: Array, count: int) -> float:
    """Agreement beyond chance, a disagreement weighing the square of its distance (Cohen, Weighted kappa, 1968).

    1 for perfect agreement, 0 for chance; NaN where all grades, and all decisions, are one and the same.
    """
    seen = confusion_matrix(grades, decided, count).astype(np.float64)
    distance = (np.arange(count)[:, None] - np.arange(count)) ** 2
    chance = (distance * np.outer(seen.sum(1), seen.sum(0))).sum() / max(seen.sum(), 1.0)
    return float(1 - (distance * seen).sum() / chance) if chance > 0 else float("nan")


def ranked_probability_score(grades: Array, probabilities: Array) -> float:
    """Mean over cases of the squared error of P(grade > k), summed over k (Epstein 1969): 0..K-1, 0 the best."""
    truth = grades[:, None] > np.arange(probabilities.shape[1] - 1)
    return float(((_above(probabilities) - truth) ** 2).sum(1).mean())


def _above(probabilities: Array) -> Array:
    """P(grade > k) for k from 0 to K - 2: (N, K - 1)."""
    return probabilities[:, ::-1].cumsum(1)[:, ::-1][:, 1:]


# -- the task


class Ordinal(Task):
    name = "ordinal"
    description = "one of several grades in their order for an image"
    target: ClassVar[Form] = "class"
    losses: ClassVar[Mapping[str, BuildLoss]] = {"corn": _corn}
    metrics: ClassVar[Mapping[str, Direction]] = {
        "kappa": "max",
        "mae": "min",
        "accuracy": "max",
        "balanced_accuracy": "max",
        "auc": "max",
        "rps": "min",
        "log_loss": "min",
    }
    evaluated = ("kappa", "mae", "accuracy", "balanced_accuracy", "auc", "rps", "ece")
    guarded = ("kappa", "accuracy")
    rare_weigh_more = False  # of neighbouring grades a heavier one would take the other's cases

    def arrange(self, found: Sequence[str], given: Sequence[str] | None, where: str) -> tuple[str, ...]:
        """Numbers, alone or behind the same word (``grade3``), are in order, and a grade that no case has counts too;
        other names have the order of ``classes.json``.

        Raises:
            DataError: names without an order, or numbers that are no grades.
        """
        if given is not None:
            return tuple(given)
        parts = [re.fullmatch(r"(.*?)([0-9]{1,9})", name) for name in found]
        numbers = {int(part[2]): part[0] for part in parts if part}
        if not numbers or len(numbers) < len(found) or len({part[1] for part in parts if part}) > 1:
            raise DataError(
                f"{where}: the grades {', '.join(found)} have no order. Number them, or list their names from the "
                'lowest to the highest in classes.json, such as ["none", "mild", "severe"]'
            )
        low, high = min(numbers), max(numbers)
        if high - low >= MOST:
            raise DataError(f"{where}: grades run from {low} to {high}; at most {MOST} are graded. Correct the labels")
        word = next(part[1] for part in parts if part)
        return tuple(numbers.get(number, f"{word}{number}") for number in range(low, high + 1))

    def outputs(self, classes: int) -> int:
        return classes - 1

    def log_probabilities(self, logits: Tensor) -> Tensor:
        above = F.logsigmoid(logits).cumsum(1)
        reached = torch.cat([torch.zeros_like(above[:, :1]), above[:, :-1]], dim=1)
        return torch.cat([reached + F.logsigmoid(-logits), above[:, -1:]], dim=1)

    def logits(self, log_probabilities: Tensor) -> Tensor:
        steps = range(log_probabilities.shape[1] - 1)
        above = [torch.logsumexp(log_probabilities[:, step + 1 :], dim=1) for step in steps]
        return torch.stack(above, dim=1) - log_probabilities[:, :-1]

    def likeliest(self, log_probabilities: Tensor) -> Tensor:
        count = log_probabilities.shape[1]
        above = log_probabilities.exp().flip(1).cumsum(1).flip(1)[:, 1:]
        decided = (above > 0.5).long().sum(dim=1, keepdim=True)
        return (decided == torch.arange(count, device=decided.device)).float()

    def probabilities(self, logits: Array) -> Floats:
        found: Floats = self.log_probabilities(torch.from_numpy(np.asarray(logits, dtype=np.float32))).exp().numpy()
        return found

    def decide(self, probabilities: Array, thresholds: Sequence[float] | None = None) -> npt.NDArray[np.int64]:
        return (_above(probabilities) > 0.5).sum(axis=1)

    def calibration(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Each step that a case reaches is a two-class problem: to stop, or to pass."""
        reached = (targets[:, None] >= np.arange(logits.shape[1])) & (targets != IGNORE)[:, None]
        passed = targets[:, None] > np.arange(logits.shape[1])
        scores = logits[reached]
        return np.stack([np.zeros(scores.size), scores], axis=1), passed[reached].astype(np.int64)

    def evidence(self, logits: Tensor, target: int) -> Tensor:
        return self.log_probabilities(logits)[:, target]

    def measures(
        self, targets: Array, probabilities: Array, thresholds: Sequence[float] | None = None
    ) -> dict[str, float]:
        grades, p = np.asarray(targets, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
        count, decided = p.shape[1], self.decide(p)
        curves = [binary_auc(one.truth, one.score) for one in self.questions(grades, p, [""] * count)]
        return {
            "kappa": quadratic_kappa(grades, decided, count),
            "mae": float(np.abs(decided - grades).mean()),
            "accuracy": accuracy(grades, decided),
            "balanced_accuracy": balanced_accuracy(confusion_matrix(grades, decided, count)),
            "auc": float(np.nanmean(curves)) if np.isfinite(curves).any() else float("nan"),
            "rps": ranked_probability_score(grades, p),
            "ece": ece(*self.confident(grades, p)),
            "log_loss": log_loss(np.eye(count)[grades], p),
        }

    def questions(self, targets: Array, probabilities: Array, classes: Sequence[str]) -> list[Question]:
        above = _above(probabilities)
        names = [*(f"{name} or more" for name in classes[1:-1]), classes[-1]]
        return [Question(name, targets > k, above[:, k]) for k, name in enumerate(names)]


TASK = Ordinal()
