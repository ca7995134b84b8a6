"""How far a round of honest training can move weights at all, by its recipe: what guards a first round.

Where nothing is usual yet, an update is held against what so many steps of the recipe's optimiser can come to, whatever
the data are. Adam's steps are normalised: each entry moves by about the learning rate at most (Kingma and Ba 2015,
arXiv:1412.6980, section 2.1; single steps may come to more, a first round's mean doesn't come to twice of it).
SGD's steps are as long as ``optim.clip_norm`` allows, times what momentum adds up to.
"""

from __future__ import annotations

import math

from medray.config.schema import Experiment
from medray.learn.aggregation.checks import norm
from medray.learn.aggregation.mean import Weights
from medray.learn.schedules import Schedule

__all__ = ["reach"]

SLACK = 2.0
"""How many times the learning rate Adam's steps may come to, in the mean over a round."""
ROUNDING = 1.01
"""For what single precision adds."""
COUNTED = 100_000
"""Steps whose learning rates are added one by one; of more the largest is taken for all."""


def reach(experiment: Experiment, weights: Weights, steps: int, *, number: int = 0) -> float | None:
    """The largest norm that honest training can give the update of ``weights`` in a round that nothing is known before.

    Args:
        experiment: the run's.
        weights: that gradients move, as the round began; running statistics are none of them.
        steps: of the optimiser in that round.
        number: of the round, from 0: those before may have come to nothing, and the schedule goes on.

    Returns:
        None where the recipe bounds nothing: SGD without ``optim.clip_norm``, or with the noise of differential
        privacy on what was clipped.
    """
    optim, most = experiment.optim, experiment.federation.rounds * steps
    if optim.name == "sgd" and (not optim.clip_norm or experiment.privacy.on):
        return None
    schedule, momentum = Schedule(experiment.schedule), optim.momentum if optim.name == "sgd" else 0.0
    if steps > COUNTED:
        travelled = optim.lr * steps * _heaped(momentum, (number + 1) * steps + 1)
    else:  # a step t has momentum of t steps before it at most, and Nesterov's of one more
        travelled = optim.lr * math.fsum(
            schedule.factor(t, most) * _heaped(momentum, t + 2) for t in range(number * steps, (number + 1) * steps)
        )
    if optim.name == "sgd":
        moved = travelled * optim.clip_norm
    else:
        moved = SLACK * travelled * math.sqrt(sum(value.size for value in weights.values()))
    # Decay pulls to zero and not beyond. Adam's is a part of its normalised step.
    decay = 0.0 if optim.name == "adam" else min(1.0, travelled * optim.weight_decay)
    return ROUNDING * (moved + decay * (norm(weights) + moved))


def _heaped(momentum: float, steps: int) -> float:
    """What momentum makes of that many steps of length 1; of the full one, their number."""
    return float(steps) if momentum == 1 else (1 - momentum**steps) / (1 - momentum)
