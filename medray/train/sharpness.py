"""Sharpness-aware minimisation: the gradient that counts is that of a point uphill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ascended", "still_statistics"]


@contextmanager
def ascended(parameters: Sequence[nn.Parameter], rho: float) -> Iterator[None]:
    """Within it the parameters lie ``rho`` along their gradient, all taken as one vector (Foret et al. 2021,
    arXiv:2010.01412); afterwards where they were, bit for bit.

    A parameter without a gradient stays. Where processes train together their gradients are the same by now, and so is
    where they go. A gradient of zero, or one that isn't finite, moves nothing.
    """
    moved: list[Tensor] = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in moved if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not moved or not torch.isfinite(norm) or float(norm) == 0.0:
        yield
        return
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        torch._foreach_add_(moved, gradients, alpha=float(rho / norm))
    gradients.clear()  # the next ones take their place
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moved, before)


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, normalisation sees its batch and moves no running statistics: a second pass over the same samples
    doesn't count."""
    tracking: list[Any] = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
