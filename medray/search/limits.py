"""Limits on what a trial costs to run, as Optuna knows them: by what share a trial breaks each.

What a trial costs is a fact, and stays with it; by how much it breaks a limit follows from the limits of today, which a
resumed study may change. Optuna keeps the latter as system attributes, and never changes a trial that has ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial

from medray.config.selection import SelectConfig
from medray.search.selection import Chooser
from medray.search.storage import MemoryFile, StudyFile

__all__ = ["COSTS", "Limits"]

COSTS = "costs"
"""User attribute of a trial: what it costs to run, by figure."""
CONSTRAINT = "constraints:"
"""Begins the name of the system attribute in which Optuna keeps one constraint of a trial."""
_WORST = 1e6  # of a limit's share; Optuna adds them up


class Limits:
    """The limits of a study, and what its trials do to them.

    Args:
        select: whose limits on costs count; that on accuracy waits for the finalists.
        file: where the trials lie.
    """

    def __init__(self, select: SelectConfig, file: StudyFile | MemoryFile) -> None:
        self._chooser, self._file = Chooser(select=select), file

    def broken(self, costs: Mapping[str, float]) -> dict[str, float]:
        """By what share of it each limit on a known cost is broken; 0 or less where it is kept."""
        known = {name: value for name, value in costs.items() if not math.isnan(value)}
        return {name: min(value, _WORST) for name, value in self._chooser.constraints(known).items()}

    def renew(self, study: str) -> None:
        """Make what is stored of a study's trials, ended ones too, that which follows from the limits of today.

        To be called before Optuna opens the study, since it keeps trials that have ended in memory.
        """
        storage = self._file.storage
        stale: dict[int, dict[str, float]] = {}  # by Optuna's id of the trial
        for trial in storage.get_all_trials(storage.get_study_id_from_name(study), deepcopy=False):
            wanted = self.broken(costs_of(trial))
            if wanted != trial.constraints:
                stale[trial._trial_id] = {f"{CONSTRAINT}{name}": value for name, value in wanted.items()}
        if stale:
            self._file.replace_system_attributes(CONSTRAINT, stale)

    def set(self, trial: int, broken: Mapping[str, float]) -> None:
        """Keep constraints of a trial, by Optuna's id, that has not ended."""
        # Where Trial.set_constraint puts it, which a handle made now can't do without drawing parameters again.
        for name, value in broken.items():
            self._file.storage.set_trial_system_attr(trial, f"{CONSTRAINT}{name}", value)


def costs_of(trial: FrozenTrial) -> dict[str, float]:
    """What is known of a trial's costs."""
    stored: Mapping[str, Any] = trial.user_attrs.get(COSTS, {})
    return {str(name): float(value) for name, value in stored.items()}
