"""Which parameters mattered: fANOVA (Hutter et al. 2014), or PED-ANOVA (Watanabe et al. 2023) on few trials."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from medray.search.pruning import RUNGS

_FEW = 8  # trials below which an importance is noise
_FOREST = 16  # completed trials from which on a random forest is worth fitting


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares of the objective's variation.

    Args:
        shares: parameter → share, largest first, sum 1; empty when too few trials can tell.
        method: ``fanova``, ``ped-anova`` or ``none``.
        trials: trials that it rests on.
        note: one sentence for the reader: what the values are, or why there are none.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    method: str = "none"
    trials: int = 0
    note: str = ""


def measure_importance(
    trials: Sequence[FrozenTrial],
    histories: Mapping[int, Sequence[Mapping[str, Any]]],
    *,
    objective: str,
    direction: str,
    seed: int,
) -> Importance:
    """Importance of each parameter for one objective.

    Final values are used if enough trials completed; else all trials are compared at the first rung, where pruned ones
    have a value too. A parameter that exists only under a condition is judged on the trials that have it, and left out
    of the shares when these are too few.

    Args:
        trials: of the space (no default from outside it).
        histories: number → reports.
        objective: metric name.
        direction: ``max`` or ``min``.
        seed: of the forest.
    """
    finished = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    final = {
        t.number: t.user_attrs.get("metrics", {}).get(objective) for t in finished if t.state == TrialState.COMPLETE
    }
    early = {t.number: _at_first_rung(histories.get(t.number, ()), objective) for t in finished}
    values = {number: value for number, value in final.items() if value is not None}
    what = f"final {objective} of the completed trials"
    if len(values) < _FEW:
        at_rung = {number: value for number, value in early.items() if value is not None}
        if len(at_rung) > len(values):
            values, what = at_rung, f"{objective} after {RUNGS[0]:.0%} of the schedule, pruned trials included"
    if len(values) < _FEW:
        return Importance(
            trials=len(values),
            note=f"{len(values)} trials have a value; importance needs at least {_FEW} to mean anything.",
        )
    if len(set(values.values())) == 1:
        return Importance(
            trials=len(values), note=f"All {len(values)} trials have the same {objective}: nothing to explain."
        )
    study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=t.params, distributions=t.distributions, value=values[t.number])
            for t in finished
            if t.number in values
        ]
    )
    method = "fanova" if len(values) >= _FOREST else "ped-anova"
    shares, left_out = _shares(study, method, seed)
    if not shares:
        return Importance(trials=len(values), note="No parameter took two values in enough trials.")
    note = f"Share of the variation of the {what} ({len(values)} trials)."
    if left_out:
        note += f" In too few trials to judge: {', '.join(left_out)}."
    return Importance(shares=shares, method=method, trials=len(values), note=note)


def _at_first_rung(history: Sequence[Mapping[str, Any]], objective: str) -> float | None:
    reached = (e["metrics"].get(objective) for e in history if e["fraction"] >= RUNGS[0] - 1e-9)
    return next(reached, None)


def _shares(study: optuna.Study, method: str, seed: int) -> tuple[dict[str, float], list[str]]:
    """Unconditional parameters together; each conditional one over its own trials, weighted by their number."""
    trials = study.get_trials(deepcopy=False)
    names = sorted({name for t in trials for name in t.params})
    having = {name: [t for t in trials if name in t.params] for name in names}
    varied = [name for name in names if len({repr(t.params[name]) for t in having[name]}) > 1]
    always = [name for name in varied if len(having[name]) == len(trials)]
    left_out = [name for name in varied if name not in always and len(having[name]) < _FEW]
    raw: dict[str, float] = _evaluate(study, method, seed, always) if always else {}
    for name in varied:
        if name not in always and name not in left_out:
            together = _evaluate(study, method, seed, [*always, name])
            raw[name] = together.get(name, 0.0) * len(having[name]) / len(trials)
    total = sum(raw.values())
    if not total > 0:
        return {}, left_out
    return dict(sorted(((n, float(v / total)) for n, v in raw.items()), key=lambda item: -item[1])), left_out


def _evaluate(study: optuna.Study, method: str, seed: int, names: list[str]) -> dict[str, float]:
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = FanovaImportanceEvaluator(seed=seed) if method == "fanova" else PedAnovaImportanceEvaluator()
        return dict(get_param_importances(study, evaluator=evaluator, params=names, normalize=False))
