"""Several networks as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medray.tasks.catalogue import find_task

Rule = Literal["mean", "vote"]
"""How members agree: the (weighted) mean of their probabilities, or of their decisions."""


class EnsembleModel(nn.Module):
    """The members' probabilities, or votes, averaged inside one graph and given back as logits.

    How, the task says: see :meth:`medray.tasks.task.Task.mix` and ``vote``.

    Args:
        members: networks of the same inputs and outputs: (B, C, *s) to logits (B, O[, *s]).
        kind: of the task.
        weights: one a member, positive, of sum 1; None: all alike.
        rule: votes are of whole answers, so they are for tasks whose answer is not put together from windows.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        kind: str,
        weights: Sequence[float] | None = None,
        rule: Rule = "mean",
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.task, self.rule = find_task(kind), rule
        shares = weights if weights is not None else [1 / len(members)] * len(members)
        self.shares = tuple(float(share) for share in shares)
        self.log_shares: Tensor
        self.register_buffer("log_shares", torch.tensor([math.log(share) for share in self.shares]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *s) to (B, O[, *s])."""
        logits = [member(x).float() for member in self.members]
        return self.task.vote(logits) if self.rule == "vote" else self.task.mix(logits, self.log_shares)


def combine(
    models: Sequence[nn.Module], kind: str, weights: Sequence[float] | None = None, rule: Rule = "mean"
) -> nn.Module:
    """The one model itself, or the ensemble of several; in evaluation mode."""
    return (models[0] if len(models) == 1 else EnsembleModel(models, kind, weights, rule)).eval()
