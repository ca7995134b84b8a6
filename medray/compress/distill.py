"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): a small network learns what a large one answers.

The teacher sees the very batch that the student sees, augmented as it is. fit() knows nothing of it: the student is
wrapped so that in training its forward gives the teacher's logits as the last level, and the loss takes them off.

Shape legend: logits (B, O) or (B, O, *s).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medray.errors import CompressionError
from medray.learn.losses import Loss
from medray.tasks.catalogue import find_task

PREFIX = "student."


class Taught(nn.Module):
    """The student, which in training also asks its teacher. The teacher is no part of its state.

    Args:
        student: what is trained.
        teacher: (B, C, *s) to logits (B, K[, *s]); is never trained.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: no submodule, no part of the weights

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """In evaluation the student's logits; in training a list of its levels, then the teacher's logits."""
        found = self.student(x)
        if not self.training:
            return found  # type: ignore[no-any-return]
        (teacher,) = self._teacher
        levels = [found] if isinstance(found, Tensor) else list(found)
        with torch.no_grad():
            soft = teacher.to(x.device)(x)
        # Zero, but a function of the student's weights: a step in parts derives every level of what forward gave.
        return [*levels, soft.to(levels[0].dtype) + 0.0 * levels[0]]


class DistillationLoss(nn.Module):
    """``(1 - alpha) * loss(student, target) + alpha * T^2 * KL(teacher / T, student / T)``.

    Args:
        hard: the task's own loss.
        kind: of the task, whose answers are compared: of several labels each by itself.
        temperature: T, softens both.
        alpha: share of the teacher.

    Raises:
        CompressionError: a temperature or share out of range.
    """

    def __init__(self, hard: Loss, kind: str, *, temperature: float, alpha: float) -> None:
        super().__init__()
        if not 0.0 < temperature <= 100.0 or not 0.0 <= alpha <= 1.0:
            raise CompressionError(
                f"distillation by temperature {temperature} and alpha {alpha}: the first must lie in (0, 100], the "
                "second in [0, 1]"
            )
        self.hard, self.task, self.temperature, self.alpha = hard, find_task(kind), temperature, alpha
        self.separable = hard.separable

    def forward(self, logits: Sequence[Tensor], target: Tensor, whole: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: what :class:`Taught` gives in training.
            target, whole: as for the hard loss.
        """
        *levels, soft = logits
        hard: Tensor = self.hard(levels if len(levels) > 1 else levels[0], target, whole)
        count = len(target if whole is None else whole)
        with torch.autocast(soft.device.type, enabled=False):
            # The last term is zero: a step in two passes takes a derivative by every level, this one's being nothing.
            return (
                (1 - self.alpha) * hard
                + self.alpha * self._soft(levels[0].float(), soft.float()) / count
                + 0.0 * soft.float().sum()
            )

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 times the divergence, mean over positions, sum over samples."""
        t = self.temperature
        log_p = self.task.log_probabilities(teacher.detach() / t)
        divergence = (log_p.exp() * (log_p - self.task.log_probabilities(student / t))).sum(1)
        return t * t * divergence.flatten(1).mean(1).sum() if divergence.ndim > 1 else t * t * divergence.sum()
