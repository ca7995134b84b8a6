"""How many steps a run has, and after which it validates.

With ``train.epochs`` alone both are known at once. With ``train.budget`` the first steps (about 3 % of the time) are
timed, one validation is timed, and the plan of steps is then fixed, so that the schedule ends when the time does, or
after ``train.epochs`` where those take less. It is corrected later only

- down, when the run would overrun what is left of its time by more than 5 % (another program came in);
- up, when more than 8 % of the time would be left over (another program had gone). Late in a run the learning rate
  then rises once more before it falls: a warm restart, which the best weights so far outlive where it brings nothing.

The plan and its corrections are part of the checkpoint: a resumed run follows the same. Timed decisions can't be the
same from run to run; ``train.epochs`` with ``train.deterministic`` takes none.
"""

from __future__ import annotations

from collections import deque
from statistics import fmean, median
from typing import Any

__all__ = ["Pace", "validation_steps"]

VALIDATIONS = 12
VALIDATION_SHARE = 0.15
"""Most of the time that validations may take where nobody asked for a certain number of them."""
CALIBRATION = (0.03, 0.06)
"""Shares of the budget after which timing may end (with STEPS timed), and must (with one)."""
NEGLIGIBLE = 10.0
"""Seconds that all validations of an unbudgeted run may take whatever their share is."""
STEPS, WINDOW = 10, 128
OVERRUN, SPARE = 0.05, 0.08


def validation_steps(total: int, count: int) -> list[int]:
    """``count`` steps in 1..``total`` (fewer if there aren't as many), the last one always; closer together towards
    the end, where the best weights lie."""
    steps = {max(1, round(total * (1 - (1 - i / count) ** 1.5))) for i in range(1, count + 1)}
    return sorted(steps | {total})


class Pace:
    """The plan of steps and validations.

    Args:
        epochs: passes over the training cases, at most.
        steps_per_epoch: optimiser steps of one pass.
        budget: seconds for all of it, or None.
        validate_every: epochs between validations, or None for about 12, fewer where they'd take more than 15 % of the
            time.
        timed: whether times may change the plan without a budget (the number of validations).
    """

    def __init__(
        self, *, epochs: int, steps_per_epoch: int, budget: float | None, validate_every: int | None, timed: bool
    ) -> None:
        self.steps_per_epoch, self.budget, self.timed = steps_per_epoch, budget, timed
        self.every = None if validate_every is None else validate_every * steps_per_epoch
        self.total = self.most = epochs * steps_per_epoch
        self.fixed = budget is None
        self.count = VALIDATIONS
        self.validate_at = self._validations() if self.fixed else []
        self.corrections: list[dict[str, float]] = []
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._validation: deque[float] = deque(maxlen=3)

    @property
    def step_seconds(self) -> float:
        """Median of the last steps, loading included; 0 before the first."""
        return median(self._steps) if self._steps else 0.0

    @property
    def validation_seconds(self) -> float:
        """Mean of the last validations; 0 before the first."""
        return fmean(self._validation) if self._validation else 0.0

    def ticked(self, seconds: float, step: int, elapsed: float) -> None:
        """Tell that ``step`` steps are done, the last in ``seconds``, ``elapsed`` seconds after the start."""
        self._steps.append(seconds)
        if self.fixed or self.budget is None:
            return
        if len(self._steps) > 2:
            # Until the plan is fixed the schedule needs some total: warm-up goes by the best guess.
            self.total = min(self.most, max(step + 1, round(self.budget / max(self._rate(), 1e-9))))
        share = elapsed / self.budget
        if (len(self._steps) >= STEPS and share >= CALIBRATION[0]) or share >= CALIBRATION[1]:
            self.validate_at = [step]

    def due(self, step: int) -> bool:
        """Whether to validate after ``step`` steps."""
        return step in self.validate_at or step >= self.total

    def validated(self, seconds: float) -> None:
        """Tell how long a validation took, its checkpoint included."""
        self._validation.append(seconds)

    def times(self) -> tuple[float, float]:
        """Seconds of a step and of a validation; processes that train together call :meth:`revise` with their mean."""
        return self._rate(), self.validation_seconds

    def revise(self, rate: float, validation: float, step: int, elapsed: float) -> None:
        """Fix the plan after the first validation of a budgeted run; later correct it where it is off (see the head).

        Args:
            rate, validation: seconds of one, see :meth:`times`.
            step: steps done.
            elapsed: seconds since the start, earlier sittings included.
        """
        if self.budget is None:
            self._thin_out(rate, validation, step)
            return
        if not self._validation:
            return
        left = self.budget - elapsed
        if not self.fixed:
            self.fixed = True
            self._plan(step, left, rate, validation)
            return
        needed = (self.total - step) * rate + sum(at > step for at in self.validate_at) * validation
        over = needed > left * (1 + OVERRUN) and step < self.total
        under = step < min(self.total, self.most) and left - needed > SPARE * self.budget
        if over or under:
            before = self.total
            self._plan(step, left, rate, validation)
            self.corrections.append({"step": step, "seconds": elapsed, "from": before, "to": self.total})

    def _plan(self, step: int, left: float, rate: float, validation: float) -> None:
        """Set ``total`` and the validations so that ``left`` seconds are used up."""
        if self.every is None:
            affordable = int(VALIDATION_SHARE * (self.budget or 0) / max(validation, 1e-9)) - 1  # one has been
            self.count = max(1, min(VALIDATIONS, affordable))
        self.total = min(self.most, max(step, 1, step + int((left - validation) / max(rate, 1e-9))))
        # Each validation takes steps away, and fewer steps may mean fewer validations: one pass more settles it.
        for _ in range(2):
            coming = max(1, sum(at > step for at in self._validations()))
            fits = step + int((left - coming * validation) / max(rate, 1e-9))
            self.total = min(self.most, max(step, 1, fits))
        self.validate_at = self._validations()

    def _thin_out(self, rate: float, validation: float, step: int) -> None:
        """Without a budget: after the first validation, drop some of the others where they'd take too long."""
        if not self.timed or self.every is not None or len(self._validation) != 1 or not validation:
            return
        most = int(VALIDATION_SHARE / (1 - VALIDATION_SHARE) * self.total * rate / validation)
        if most < self.count and self.count * validation > NEGLIGIBLE:
            self.count = max(2, most)
            self.validate_at = [at for at in self._validations() if at > step]

    def _validations(self) -> list[int]:
        if self.every is not None:
            return sorted({*range(self.every, self.total, self.every), self.total})
        return validation_steps(self.total, min(self.count, self.total))

    def _rate(self) -> float:
        """Mean seconds of a step; the first two of a run, which set up kernels and workers, don't count."""
        times = list(self._steps)
        return fmean(times[2:] if 2 < len(times) < WINDOW else times) if times else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {
            "total": self.total,
            "fixed": self.fixed,
            "count": self.count,
            "validate_at": list(self.validate_at),
            "corrections": [dict(row) for row in self.corrections],
            "steps": list(self._steps),
            "validation": list(self._validation),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.total, self.fixed, self.count = state["total"], state["fixed"], state["count"]
        self.validate_at, self.corrections = list(state["validate_at"]), list(state["corrections"])
        self._steps.clear()
        self._steps.extend(state["steps"])
        self._validation.clear()
        self._validation.extend(state["validation"])
