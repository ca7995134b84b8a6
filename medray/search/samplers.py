"""Which Optuna sampler a study uses, reseeded before each trial so that a resumed study continues as it would have."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from medray.errors import StudyError
from medray.search.space import Space

OUTSIDE = "outside_space"
"""User attribute of the default trial when the space does not contain it: the sampler must not see it."""
SamplerName = Literal["tpe", "random", "cmaes", "nsga2"]
_MANY_TRIALS = 250  # from which on evolution beats TPE on cheap problems (the limit Optuna's own AutoSampler uses)


def derive_seed(*parts: int) -> int:
    """A 31-bit seed from whole numbers, the same in every process."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def choose_sampler(name: str, space: Space, *, objectives: int, trials: int) -> SamplerName:
    """The sampler that ``auto`` stands for, or ``name`` if it can search this space.

    TPE unless there are many trials: then CMA-ES on a plain numeric space, NSGA-II for several objectives.

    Raises:
        StudyError: CMA-ES for several objectives, or on fewer than two unconditional ranges.
    """
    if name == "auto":
        if trials < _MANY_TRIALS:
            return "tpe"
        if objectives > 1:
            return "nsga2"
        return "cmaes" if space.is_plain and len(space) >= 2 else "tpe"
    if name == "cmaes" and objectives > 1:
        raise StudyError(f"study.sampler=cmaes knows one objective, this study has {objectives}; use tpe or nsga2")
    if name == "cmaes" and len(space.numeric) < 2:
        raise StudyError(
            f"study.sampler=cmaes needs at least two float or int parameters without 'when'; this space has "
            f"{len(space.numeric)}; use tpe"
        )
    if name not in ("tpe", "random", "cmaes", "nsga2"):
        raise StudyError(f"study.sampler={name!r} is unknown; use auto, tpe, random, cmaes or nsga2")
    return name  # type: ignore[return-value]


def build_sampler(name: SamplerName, *, seed: int, trials: int) -> BaseSampler:
    """One Optuna sampler with a fresh random state.

    Args:
        name: of :func:`choose_sampler`.
        seed: of its random state.
        trials: planned in the study; sets how many are drawn at random first, or the size of a generation.
    """
    start = max(4, min(10, trials // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=start, multivariate=True, group=True, constant_liar=True
            )
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed,
                n_startup_trials=start,
                independent_sampler=optuna.samplers.RandomSampler(seed=derive_seed(seed, 1)),
                warn_independent_sampling=False,
            )
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, trials // 5)))
        return optuna.samplers.RandomSampler(seed=seed)


class _InSpace(Study):
    """A study without the default trial that lies outside the space.

    CMA-ES and NSGA-II search the intersection of all trials' parameters, which an empty trial makes empty; TPE would
    let it take a place among the best without learning anything from it.
    """

    def __init__(self, study: Study) -> None:
        super().__init__(study_name=study.study_name, storage=study._storage, pruner=study.pruner)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=deepcopy, states=states, use_cache=use_cache)
        return [trial for trial in trials if OUTSIDE not in trial.user_attrs]

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy=deepcopy, states=states)


class ReseededSampler(BaseSampler):
    """New samplers for each trial, seeded by its number; all that they know comes from the stored trials.

    Parameters that are drawn one by one get a sampler each, seeded by their name too: a trial whose drawing was cut off
    half-way is completed as it would have been.

    Args:
        make: seed → sampler.
        seed: of the study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._inner: BaseSampler = optuna.samplers.RandomSampler(seed=seed)  # until the first trial is asked for
        self._view: Study | None = None

    def _study(self, study: Study) -> Study:
        if self._view is None:
            self._view = _InSpace(study)
        # The cache lives for one ask; the view must not outlive it.
        self._view._thread_local.cached_all_trials = None
        return self._view

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = self._make(derive_seed(self._seed, trial.number))
        self._inner.before_trial(self._study(study), trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(self._study(study), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(self._study(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        sampler = self._make(derive_seed(self._seed, trial.number, *param_name.encode()))
        return sampler.sample_independent(self._study(study), trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        if OUTSIDE not in trial.user_attrs:
            self._inner.after_trial(self._study(study), trial, state, values)
