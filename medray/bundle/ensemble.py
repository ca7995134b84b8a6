"""Several networks as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medray.data.manifest import TaskKind


class EnsembleModel(nn.Module):
    """The mean of the members' probabilities, inside one graph, given back as logits.

    For softmax tasks these are log-probabilities; for multilabel the log-odds of the mean. Both are computed in the log
    domain, so that a sure ensemble does not become infinite.

    Args:
        members: networks of the same inputs and outputs: (B, C, *s) to logits (B, K[, *s]).
        kind: of the task.
    """

    def __init__(self, members: Sequence[nn.Module], kind: TaskKind) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *s) to (B, K[, *s])."""
        logits = torch.stack([member(x).float() for member in self.members])
        if self.kind == "multilabel":
            return torch.logsumexp(F.logsigmoid(logits), dim=0) - torch.logsumexp(F.logsigmoid(-logits), dim=0)
        return torch.logsumexp(F.log_softmax(logits, dim=2), dim=0) - math.log(len(self.members))


def combine(models: Sequence[nn.Module], kind: TaskKind) -> nn.Module:
    """The one model itself, or the ensemble of several; in evaluation mode."""
    return (models[0] if len(models) == 1 else EnsembleModel(models, kind)).eval()
