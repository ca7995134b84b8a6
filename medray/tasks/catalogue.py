"""The tasks by name. A new one is a file with ``TASK`` and one line in ``TASKS``: see docs/new-task.md."""

from __future__ import annotations

import difflib
from typing import Annotated

import torch
from pydantic import AfterValidator

from medray.config.schema import LossConfig
from medray.errors import ConfigError
from medray.learn.losses import Loss
from medray.tasks import classification, multilabel, ordinal, segmentation
from medray.tasks.task import Direction, Form, Task

__all__ = ["TASKS", "TaskKind", "build_loss", "direction_of", "find_task", "named_for"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        classification.TASK,
        multilabel.TASK,
        segmentation.TASK,
        ordinal.TASK,
    )
}
"""Of several with the same form of target, the first is what data mean where nothing is said."""


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none; the message has the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"there is no task '{name[:60]}'.{hint} There are: {', '.join(TASKS)}")


def _known(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"there is no task {name[:60]!r}; there are {', '.join(TASKS)}")
    return name


TaskKind = Annotated[str, AfterValidator(_known)]
"""The name of a task, in files that are read."""


def named_for(form: Form) -> tuple[str, ...]:
    """Names of the tasks whose targets are of that form, the first the one that is meant unless said otherwise."""
    return tuple(name for name, task in TASKS.items() if task.target == form)


def direction_of(metric: str) -> Direction:
    """Whether more or less of a metric (without ``val/``) is better; more, of one that no task has."""
    return next((task.metrics[metric] for task in TASKS.values() if metric in task.metrics), "max")


def build_loss(config: LossConfig, *, kind: str, num_classes: int) -> Loss:
    """The loss that ``config`` names.

    Args:
        config: ``class_weights`` scale each class's term (cross-entropy, focal, corn), the positives of each class
            (bce, multilabel focal), or the share of each class in the mean over classes (Dice, Tversky; background is
            left out there). ``label_smoothing`` acts on all but Dice and Tversky.
        kind: the task.
        num_classes: K, background included.

    Raises:
        ConfigError: a loss that this task can't use, or weights that don't match the classes.
    """
    task = find_task(kind)
    task.check_loss(config.name)
    if config.class_weights is not None:
        if len(config.class_weights) != num_classes:
            raise ConfigError(
                f"loss.class_weights has {len(config.class_weights)} values for {num_classes} classes; give one a class"
            )
        overlaps = config.name in ("dice", "tversky", "dice_ce", "dice_heteroscedastic")
        foreground = config.class_weights[1:] if overlaps else config.class_weights
        if not any(foreground):
            raise ConfigError(
                "loss.class_weights are all zero, so nothing would be learnt; give a positive weight to a class"
            )
    weights = None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float32)
    return task.losses[config.name](config, num_classes, weights)
