"""Does a network that was crowned under a limit on latency ever break it when it is measured again?

Twenty choices among networks of which the slower ones score better, each under another limit, drawn near the latencies
that were measured, where it is easy to be wrong. Crowning is a study's own (``workflows.selecting.crown``); then the
crowned network is exported and measured anew. It breaks the limit if that 95 % interval lies wholly beyond it. Beside
it: the rule that believes one first measurement, without an interval.

    python -m benchmarks constraints
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import Figure, Result, Target
from medray.config.schema import StudyConfig
from medray.errors import StudyError
from medray.learn.intervals import Interval
from medray.workflows.champion import Scores
from medray.workflows.costs import costs_of, untrained
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.selecting import Quiet, crown, make_chooser

ROUNDS, QUICK_ROUNDS = 20, 1
WIDTHS, QUICK_WIDTHS = (8, 48, 96, 160, 224), (4, 64)
SIDE = 64
NEAR = (0.9, 1.15)
"""A limit is a measured latency times something between these."""
CASES = 100


@dataclass(frozen=True, kw_only=True)
class Round:
    """One choice under one limit: the latencies of who was crowned when measured again; None where nobody was."""

    limit: float
    ours: Interval | None
    naive: Interval | None


def run(quick: bool) -> Result:
    """Choose and measure again."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="medray-bench-") as folder:
        recipe = _recipe(Path(folder))
        found = [
            _round(recipe, Path(folder), WIDTHS if not quick else QUICK_WIDTHS, random.Random(seed))
            for seed in range(rounds)
        ]
    figures, peers = _figures([(r.limit, r.ours) for r in found]), _figures([(r.limit, r.naive) for r in found])
    notes = [
        f"small_cnn of widths {WIDTHS if not quick else QUICK_WIDTHS} on {SIDE}x{SIDE} images, random weights; the "
        "wider one has the better score. Beyond: the 95 % interval of the new measurement lies wholly above the limit.",
        "Nobody is crowned where no network keeps the limit with the upper end of its interval.",
    ]
    return Result(
        figures=figures,
        targets={"crowned_beyond_the_limit": Target(op="==", value=0)},
        peers={"first median within the limit": peers},
        notes=notes,
    )


def _figures(rows: Sequence[tuple[float, Interval | None]]) -> dict[str, Figure]:
    crowned = [(limit, again) for limit, again in rows if again is not None]
    return {
        "crowned_beyond_the_limit": Figure(value=sum(again.low > limit for limit, again in crowned)),
        "median_beyond_the_limit": Figure(value=sum(again.value > limit for limit, again in crowned)),
        "crowned": Figure(value=len(crowned)),
        "choices": Figure(value=len(rows)),
    }


def _recipe(folder: Path) -> Recipe:
    prepare_directory(f"phantom://xray-nodules?cases=14&size={SIDE}", folder)
    explicit = {"model": {"name": "small_cnn", "depth": 2}, "preprocess": {"size": [SIDE, SIDE]}, "device": "cpu"}
    return Recipe(directory=str(folder), explicit=explicit, cache=str(folder / "cache"))


def _round(recipe: Recipe, folder: Path, widths: Sequence[int], lot: random.Random) -> Round:
    candidates = [
        replace(untrained(recipe, recipe.experiment({"model.feature_size": width})), name=str(width))
        for width in widths
    ]
    # The look that a trial takes before it trains: once an architecture, remembered for all rounds.
    first = {c.name: costs_of(recipe, c, folder / "first", trained=False) for c in candidates}
    limit = first[lot.choice(candidates).name].latency_ms.value * lot.uniform(*NEAR)
    within = [c for c in candidates if first[c.name].latency_ms.value <= limit]
    naive = within[-1] if within else None
    scores = {c.name: _scores(0.6 + 0.3 * place / len(candidates)) for place, c in enumerate(candidates)}
    study = StudyConfig.model_validate({"select": {"limits": {"latency_ms": limit}}})
    chooser = make_chooser(study, {"val/auc": "max"}, ("val/auc", "max"), ("val/auc",))
    quiet = Quiet(recipe=recipe, budget=1e6, tell=lambda _: None)
    try:
        ours = crown(candidates, scores, chooser, "val/auc", (), quiet).winner
    except StudyError:
        ours = None
    again: dict[str, Interval] = {}
    for candidate in candidates:
        if candidate.name == ours or candidate is naive:
            again[candidate.name] = costs_of(recipe, candidate, folder / "again", quiet=True, afresh=True).latency_ms
    return Round(
        limit=limit,
        ours=None if ours is None else again[ours],
        naive=None if naive is None else again[naive.name],
    )


def _scores(share: float) -> Scores:
    """Of a classifier that is right in such a share of cases."""
    targets = np.arange(CASES) % 2
    right = np.arange(CASES) // 2 < round(share * CASES / 2)
    logit = np.where(right, targets, 1 - targets) * 2.0 - 1.0
    return Scores(
        kind="classification",
        metric="auc",
        indices=tuple(range(CASES)),
        groups=np.asarray([f"patient {i}" for i in range(CASES)]),
        logits=np.stack([-logit, logit], axis=1).astype(np.float32),
        targets=targets,
    )
