"""Task: all that differs between one thing to be learnt and another, in one place.

Legend: N cases (B in torch), O channels of the network's last layer, K classes, A answers, *s spatial.

- *logits* (N, O[, *s]) are what a network gives, and what an engine must reproduce;
- *answers* (N, A, ...) exclude each other along axis 1: the K classes, or no and yes of each label. Their
  log-probabilities are what networks are averaged and distilled by;
- *probabilities* (N, K[, *s]) are what a user sees;
- *targets* (N,) are class indices, (N, K) zeros and ones where a case has several labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from medray.config.schema import LossConfig
from medray.errors import ConfigError
from medray.learn.activations import softmax
from medray.learn.losses import Loss
from medray.learn.metrics import entropy

__all__ = ["BuildLoss", "Direction", "Form", "Question", "Task"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Direction = Literal["max", "min"]

Form = Literal["class", "labels", "mask"]
"""What a case's target is: the index of a class, a 0 or 1 for each label, or an image of class indices."""

BuildLoss = Callable[[LossConfig, int, Tensor | None], Loss]
"""From the configuration, the number of classes and their weights (K,) to the loss over logits."""


class Question(NamedTuple):
    """One yes or no that a report draws curves of: its name, the truth (N,) bool, and the score (N,)."""

    name: str
    truth: Array
    score: Array


class Task:
    """The base: one of K classes, by softmax. A task overrides what is different, most often little.

    Attributes:
        name: what ``task.kind`` says, in files and on the command line.
        description: a few words for the model card.
        target: what a case's target is.
        losses: by name, the default first.
        metrics: what may be an objective, with its direction; the default objective first.
        evaluated: the metrics that ``medray evaluate`` states; of masks it is Dice and HD95 by class.
        guarded: the metrics that compression may not lower.
        private_metric: what leaves with a private model: the mean of :meth:`correct` (Dice of masks), which noise can
            hide one case in.
        tie: the metric by which the better of two equals is found, the less the better; None for none.
        thresholds: whether a label is told where its probability reaches a threshold of its own.
        rare_weigh_more: whether the plan gives rare classes a larger weight in the loss.
        fewest_classes: that the task makes sense for.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    target: ClassVar[Form]
    losses: ClassVar[Mapping[str, BuildLoss]]
    metrics: ClassVar[Mapping[str, Direction]]
    evaluated: ClassVar[tuple[str, ...]]
    guarded: ClassVar[tuple[str, ...]]
    private_metric: ClassVar[str] = "accuracy"
    tie: ClassVar[str | None] = "log_loss"
    thresholds: ClassVar[bool] = False
    rare_weigh_more: ClassVar[bool] = True
    fewest_classes: ClassVar[int] = 2

    # -- what follows from these

    @property
    def dense(self) -> bool:
        """Whether the answer is one for each pixel or voxel: masks, windows, Dice."""
        return self.target == "mask"

    @property
    def objective(self) -> tuple[str, Direction]:
        """What a study looks for unless told otherwise."""
        name, direction = next(iter(self.metrics.items()))
        return f"val/{name}", direction

    @property
    def private_objective(self) -> tuple[str, Direction]:
        """The figure of a private run."""
        return f"val/{self.private_metric}", "max"

    # -- data

    def arrange(self, found: Sequence[str], given: Sequence[str] | None, where: str) -> tuple[str, ...]:
        """The classes in their order.

        Args:
            found: names in the data, numbers by size and words by the alphabet.
            given: all names, as ``classes.json`` lists them; None without it.
            where: the data, for messages.
        """
        return tuple(found if given is None else given)

    # -- the network

    def outputs(self, classes: int) -> int:
        """Channels of the last layer: one a class (also of two)."""
        return classes

    def check_loss(self, name: str) -> None:
        """Refuse a loss that the task can't use.

        Raises:
            ConfigError: names those that it can.
        """
        if name not in self.losses:
            raise ConfigError(f"loss.name={name} does not fit a {self.name} task; use one of {', '.join(self.losses)}")

    # -- from logits to answers

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """(B, O[, *s]) to the log-probabilities of the answers (B, A, ...)."""
        return F.log_softmax(logits, dim=1)

    def logits(self, log_probabilities: Tensor) -> Tensor:
        """The inverse: logits (B, O[, *s]) of such answers."""
        return log_probabilities

    def likeliest(self, log_probabilities: Tensor) -> Tensor:
        """(B, A, ...) of ones where the answer is the decision, zeros else."""
        return _one_hot(log_probabilities.argmax(dim=1, keepdim=True), log_probabilities.shape[1])

    def probabilities(self, logits: Array) -> Floats:
        """Logits (N, O[, *s]) to what a user sees, (N, K[, *s])."""
        return softmax(logits, axis=1)

    def decide(self, probabilities: Array, thresholds: Sequence[float] | None = None) -> npt.NDArray[np.int64]:
        """Decisions of probabilities (N, K[, *s]), shaped as targets are: (N[, *s]), or (N, K)."""
        return probabilities.argmax(axis=1)

    def calibration(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """The softmax problems that one temperature is fitted to: scores (M, A), and (M,) which is true."""
        return logits, targets

    def evidence(self, logits: Tensor, target: int) -> Tensor:
        """What speaks for a class, (B[, *s]): what a class-activation map derives."""
        return logits[:, target]

    def uncertainty(self, probabilities: Floats) -> float:
        """Of one answer (K,): 0 certain, 1 no idea. Normalised entropy."""
        return float(entropy(probabilities))

    # -- several networks

    def mix(self, logits: Sequence[Tensor], log_shares: Tensor) -> Tensor:
        """Logits of the mean probability of M networks' answers.

        In the log domain, so that an ensemble that is sure does not become infinite.

        Args:
            logits: M of (B, O[, *s]).
            log_shares: (M,) logarithms of their weights; minus infinity for none.
        """
        parts = torch.stack([self.log_probabilities(one) for one in logits])
        return self.logits(torch.logsumexp(parts + log_shares.reshape(-1, *[1] * (parts.ndim - 1)), dim=0))

    def vote(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits of the share of M networks that decide for an answer, each with one more vote shared among all
        answers (Laplace's rule of succession): nothing is impossible because none chose it."""
        votes = torch.stack([self.likeliest(self.log_probabilities(one)) for one in logits]).sum(dim=0)
        return self.logits(torch.log((votes + 1 / votes.shape[1]) / (len(logits) + 1)))

    # -- how good

    def measures(
        self, targets: Array, probabilities: Array, thresholds: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Every metric of N cases; NaN where one isn't defined."""
        raise NotImplementedError

    def measure(self, metric: str, *arrays: Array) -> float:
        """One metric of N cases, of (targets, probabilities); of masks, of (N, K - 1) Dice by class."""
        targets, probabilities = arrays
        return self.measures(targets, probabilities)[metric]

    def correct(self, targets: Array, probabilities: Array) -> Array:
        """(N,) from 0 to 1: how much of each case is decided rightly."""
        same = self.decide(probabilities) == targets
        return same.reshape(len(same), -1).mean(axis=1)

    def confident(self, targets: Array, probabilities: Array) -> tuple[Array, Array]:
        """How sure each decision was, and whether it was right: (M,) each, for the reliability diagram."""
        decided = self.decide(probabilities)
        return probabilities[np.arange(len(decided)), decided], (decided == targets).astype(float)

    def questions(self, targets: Array, probabilities: Array, classes: Sequence[str]) -> list[Question]:
        """What ROC and precision-recall curves are drawn of: each class against the rest, of two the second."""
        shown = range(1, 2) if len(classes) == 2 else range(len(classes))
        return [Question(classes[k], targets == k, probabilities[:, k]) for k in shown]


def _one_hot(index: Tensor, count: int) -> Tensor:
    """(B, 1, ...) to (B, count, ...) float; by comparison, which every exporter knows."""
    answers = torch.arange(count, device=index.device).reshape(1, -1, *[1] * (index.ndim - 2))
    return (index == answers).float()
