"""Several networks as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medray.data.manifest import TaskKind

Rule = Literal["mean", "vote"]
"""How members agree: the (weighted) mean of their probabilities, or of their decisions."""


class EnsembleModel(nn.Module):
    """The members' probabilities, or votes, averaged inside one graph and given back as logits.

    For softmax tasks these are log-probabilities; for multilabel the log-odds of the mean. Both are computed in the log
    domain, so that a sure ensemble does not become infinite. Votes are counted with one more, shared among all answers
    (Laplace's rule of succession), for the same reason.

    Args:
        members: networks of the same inputs and outputs: (B, C, *s) to logits (B, K[, *s]).
        kind: of the task.
        weights: one a member, positive, of sum 1; None: all alike.
        rule: votes are of whole answers, so they are for tasks whose answer is not put together from windows.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        kind: TaskKind,
        weights: Sequence[float] | None = None,
        rule: Rule = "mean",
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.kind, self.rule = kind, rule
        shares = weights if weights is not None else [1 / len(members)] * len(members)
        self.shares = tuple(float(share) for share in shares)
        self.log_shares: Tensor
        self.register_buffer("log_shares", torch.tensor([math.log(share) for share in self.shares]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *s) to (B, K[, *s])."""
        logits = torch.stack([member(x).float() for member in self.members])
        if self.rule == "vote":
            return self._count(logits)
        log_shares = self.log_shares.reshape(-1, *[1] * (logits.ndim - 1))
        if self.kind == "multilabel":
            yes, no = F.logsigmoid(logits) + log_shares, F.logsigmoid(-logits) + log_shares
            return torch.logsumexp(yes, dim=0) - torch.logsumexp(no, dim=0)
        return torch.logsumexp(F.log_softmax(logits, dim=2) + log_shares, dim=0)

    def _count(self, logits: Tensor) -> Tensor:
        """(M, B, K) to (B, K)."""
        count = len(self.members)
        if self.kind == "multilabel":
            yes = (logits > 0).float().sum(dim=0)
            return torch.log(yes + 0.5) - torch.log(count - yes + 0.5)
        classes = logits.shape[2]
        chosen = logits.argmax(dim=2, keepdim=True) == torch.arange(classes, device=logits.device)
        return torch.log((chosen.float().sum(dim=0) + 1 / classes) / (count + 1))


def combine(
    models: Sequence[nn.Module], kind: TaskKind, weights: Sequence[float] | None = None, rule: Rule = "mean"
) -> nn.Module:
    """The one model itself, or the ensemble of several; in evaluation mode."""
    return (models[0] if len(models) == 1 else EnsembleModel(models, kind, weights, rule)).eval()
