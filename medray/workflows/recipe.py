"""Recipe: what all trials of a study, and the final fits, share; and how one of them becomes an Experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medray.config.compose import build_experiment
from medray.config.schema import Experiment
from medray.data.fingerprint import Fingerprint
from medray.data.manifest import Manifest
from medray.data.splits import Splits, make_splits
from medray.errors import ConfigError
from medray.models.catalogue import lookup
from medray.plan.machine import Machine
from medray.plan.plan import Tree, plan
from medray.privacy.rules import adapted, check_private
from medray.tasks.catalogue import find_task

FIXED = ("data", "seed", "task", "split")
"""Fields that a search may not touch: which cases validate, and the seed, whose choice would be luck sold as skill."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a study that does not vary between trials. Small and picklable: data are read from the files it names.

    Attributes:
        directory: where ``manifest.json`` and ``fingerprint.json`` lie.
        explicit: what the user set, as a sparse tree of Experiment fields; wins over the plan.
        cache: folder of prepared cases.
        machine: what the plan is made for.
        horizon: seconds for which the champion will have trained; all trials on the way there plan for it.
    """

    directory: str
    explicit: Tree
    cache: str
    machine: Machine = field(default_factory=Machine.here)
    horizon: float | None = None

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.load(Path(self.directory) / "manifest.json")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint.load(Path(self.directory) / "fingerprint.json")

    def experiment(
        self, params: Mapping[str, Any] | None = None, *, budget: float | None = None, twin: int = 0
    ) -> Experiment:
        """The plan, under what the user set, under a trial's own parameters.

        Args:
            params: dotted paths of Experiment fields to values; empty for trial 0.
            budget: seconds of training; the user's own ``train.epochs`` or ``train.budget`` win.
            twin: added to the seed: the same experiment with other random draws, on the same cases.

        Raises:
            ConfigError: a path doesn't exist, a field refuses its value, or the task has no such loss.
            ModelError: the network can't do this task, or doesn't have a field that was set.
        """
        own = nest(params or {})
        for key in FIXED:
            if key in own:
                raise ConfigError(
                    f"space.{key}: may not vary within a study: trials would be judged on different cases, or by luck. "
                    f"Set {key} outside of space"
                )
        model = (own.get("model") or {}).get("name") or (self.explicit.get("model") or {}).get("name")
        planned = plan(self.fingerprint, self.machine, model=model, budget=budget, horizon=self.horizon)
        explicit_train = self.explicit.get("train") or {}
        if "epochs" in explicit_train and "budget" not in explicit_train:
            planned["train"]["budget"] = None
        experiment = build_experiment(*adapted(planned, self.explicit), own)
        find_task(self.manifest.task).check_loss(experiment.loss.name)
        check_private(experiment, kind=self.manifest.task)
        if twin:
            experiment = experiment.model_copy(update={"seed": (experiment.seed + 7919 * twin) % 2**31})
        lookup(experiment.model.name).check(
            experiment.model,
            kind=self.manifest.task,
            ndim=self.manifest.ndim,
            patch_size=experiment.train.patch_size or experiment.preprocess.size,
        )
        return experiment

    def splits(self, experiment: Experiment) -> Splits:
        """Which cases train, validate and test: the same for every trial."""
        return make_splits(self.manifest, experiment.split, experiment.split.seed)


def nest(params: Mapping[str, Any]) -> Tree:
    """``{"optim.lr": 1e-3}`` to ``{"optim": {"lr": 1e-3}}``."""
    tree: Tree = {}
    for path, value in params.items():
        *parents, leaf = path.split(".")
        level = tree
        for parent in parents:
            level = level.setdefault(parent, {})
        level[leaf] = value
    return tree
