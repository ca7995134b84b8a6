"""Augmentation whose strength follows the validation.

Where the validated metric falls the network is asked too much: a tenth less. Where it rises clearly there is room: a
tenth more. A trend is that of the least-squares line through the last five epochs (and three validations at least);
a fall has to exceed twice the standard error of the line's slope, a rise three times, so that noise moves little.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

__all__ = ["AdaptiveStrength"]

EPOCHS, VALIDATIONS = 5, 3
STEP, LEAST, MOST = 0.1, 0.1, 1.0


class AdaptiveStrength:
    """The strength of augmentation for each epoch.

    Args:
        start: ``augment.strength``.
        mode: which way the validated metric improves.
    """

    def __init__(self, start: float, mode: Literal["max", "min"]) -> None:
        self._sign = 1.0 if mode == "max" else -1.0
        self._changes: list[tuple[int, float]] = [(0, start)]  # (first epoch, strength)
        self._rows: list[tuple[int, float]] = []  # since the last change

    def at(self, epoch: int) -> float:
        """The strength in ``epoch`` (from 0). What is observed within an epoch acts from the next one on, so that a
        run that is resumed in the middle of it draws the same."""
        return next(strength for first, strength in reversed(self._changes) if first <= epoch)

    def observe(self, epoch: int, value: float) -> None:
        """Take the metric that was validated in ``epoch`` (from 0); a NaN says nothing."""
        if not np.isfinite(value):
            return
        self._rows.append((epoch, self._sign * value))
        recent = [row for row in self._rows if row[0] > epoch - EPOCHS]
        rows = np.array(recent if len(recent) >= VALIDATIONS else self._rows[-VALIDATIONS:])
        if len(rows) < VALIDATIONS or rows[-1, 0] - rows[0, 0] < EPOCHS - 1:
            return
        x, y = rows[:, 0] - rows[:, 0].mean(), rows[:, 1] - rows[:, 1].mean()
        slope = float(x @ y / (x @ x))
        error = float(np.sqrt(((y - slope * x) ** 2).sum() / max(1, len(rows) - 2) / (x @ x)))
        step = -STEP if slope < -2 * error else STEP if slope > 3 * error else 0.0
        strength = round(min(MOST, max(LEAST, self._changes[-1][1] + step)), 3)
        if step and strength != self._changes[-1][1]:
            self._changes.append((epoch + 1, strength))
            self._rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {"changes": [list(row) for row in self._changes], "rows": [list(row) for row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._changes = [(int(first), float(strength)) for first, strength in state["changes"]]
        self._rows = [(int(epoch), float(value)) for epoch, value in state["rows"]]
