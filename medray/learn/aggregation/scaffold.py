"""SCAFFOLD's control variates, option II (Karimireddy et al., ICML 2020, arXiv:1910.06378).

Sites whose data differ pull apart while they train. Each site's gradients are corrected by c - c_i, the mean gradient
of all sites less its own, as the last rounds had them. With x the round's first weights, y_i a site's last and L the
sum of its learning rates, c_i becomes c_i - c + (x - y_i) / L. All of that can be told from the updates y_i - x, so the
server keeps every c_i, by the updates that counted alone, and sends each site its c - c_i: a site that was late, or
whose update was quarantined, is corrected by what is known of it.

Unlike in the paper, c is the mean by training cases, as that of the updates is, and over the sites of which a c_i is
known; one of which none is yet is not corrected, where the paper takes its c_i for 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from medray.config.schema import Experiment
from medray.learn.aggregation.mean import Weights
from medray.learn.schedules import Schedule

__all__ = ["CORRECTION", "attach_correction", "control_of", "parted", "travelled"]

CORRECTION = "correction/"
"""Before names of corrections, where they travel beside weights."""


def travelled(experiment: Experiment, number: int) -> float:
    """The sum of the learning rates of a round, from 0, of ``federation.local_steps`` steps."""
    federation, schedule = experiment.federation, Schedule(experiment.schedule)
    steps = federation.local_steps or 1
    first, most = number * steps, federation.rounds * steps
    return experiment.optim.lr * math.fsum(schedule.factor(first + step, most) for step in range(steps))


def control_of(correction: Weights, update: Weights, length: float) -> Weights:
    """A site's control variate after a round: the mean gradient that it followed.

    Args:
        correction: c - c_i that it was sent, with all names.
        update: y_i - x, with these names at least.
        length: of :func:`travelled`, above 0.
    """
    return {name: (-value - update[name] / length).astype(value.dtype) for name, value in correction.items()}


def parted(arrays: Mapping[str, np.ndarray]) -> tuple[Weights, Weights]:  # type: ignore[type-arg]
    """Weights, and corrections by the names of the weights that they belong to."""
    weights = {name: value for name, value in arrays.items() if not name.startswith(CORRECTION)}
    more = {n.removeprefix(CORRECTION): value for n, value in arrays.items() if n.startswith(CORRECTION)}
    return weights, more


def attach_correction(optimizer: torch.optim.Optimizer, model: nn.Module, correction: Mapping[str, Tensor]) -> None:
    """Let every step of ``optimizer`` add ``correction`` to the gradient that it is handed, after any clipping.

    Args:
        optimizer: over parameters of ``model``.
        correction: c - c_i by the parameter's name; parameters without one are left alone.
    """
    pairs = [(value, correction[name].to(value)) for name, value in model.named_parameters() if name in correction]

    def correct(_optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        with torch.no_grad():
            for parameter, more in pairs:
                parameter.grad = more.clone() if parameter.grad is None else parameter.grad.add_(more)

    if pairs:
        optimizer.register_step_pre_hook(correct)
