"""SCAFFOLD's control variates, option II (Karimireddy et al., ICML 2020, arXiv:1910.06378).

Sites whose data differ pull apart while they train. Each site's gradients are corrected by c - c_i, the mean gradient
of all sites less its own, as the last rounds had them. With x the round's first weights, y_i a site's last and L the
sum of its learning rates, c_i becomes c_i - c + (x - y_i) / L. The server needs no more than the updates y_i - x: it
moves c by the share of the sites that took part, times the mean of -c - (y_i - x) / L.
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

__all__ = ["CONTROL", "attach_correction", "moved_control", "parted", "travelled"]

CONTROL = "control/"
"""Before names of control variates, where they travel beside weights."""


def travelled(experiment: Experiment, number: int) -> float:
    """The sum of the learning rates of a round, from 0, of ``federation.local_steps`` steps."""
    federation, schedule = experiment.federation, Schedule(experiment.schedule)
    steps = federation.local_steps or 1
    first, most = number * steps, federation.rounds * steps
    return experiment.optim.lr * math.fsum(schedule.factor(first + step, most) for step in range(steps))


def moved_control(own: Weights, control: Weights, update: Weights, length: float) -> Weights:
    """A site's control variate after a round; with nothing for its own, how far that moved.

    Args:
        own: c_i, by the name of a parameter; what is missing is 0.
        control: c, with all names.
        update: y_i - x, with these names at least.
        length: of :func:`travelled`.
    """
    if length <= 0:  # a schedule that has come to nothing: so has what could be learned of gradients
        return {name: own.get(name, np.zeros_like(value)) for name, value in control.items()}
    return {
        name: (own.get(name, np.zeros_like(value)) - value - update[name] / length).astype(value.dtype)
        for name, value in control.items()
    }


def parted(arrays: Mapping[str, np.ndarray]) -> tuple[Weights, Weights]:  # type: ignore[type-arg]
    """Weights, and control variates by the names of the weights that they belong to."""
    weights = {name: value for name, value in arrays.items() if not name.startswith(CONTROL)}
    return weights, {name.removeprefix(CONTROL): value for name, value in arrays.items() if name.startswith(CONTROL)}


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
