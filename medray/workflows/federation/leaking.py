"""What a federation's model gives away of who was in its training: the loss attack, where a simulation can make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from medray.config.privacy import PrivacyConfig
from medray.errors import PrivacyError
from medray.privacy.attack import membership_attack, most_true_positives
from medray.report.data import Interval as Shown
from medray.report.federation import AttackRow
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate, Scores
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network

__all__ = ["attacks", "case_losses"]

MOST_CASES = 300
"""Of either kind, by lot: each is predicted once more."""
FEWEST_CASES = 10
FALSE_POSITIVES = 0.1
"""Share of others that may be taken for members; of a few dozen cases no smaller one can be told."""

Networks = Mapping[str, Network]
"""A model as each site has it."""


def attacks(
    recipe: Recipe,
    models: Mapping[str, Networks],
    train: Sequence[int],
    unseen: Sequence[int],
    *,
    metric: str,
    privacy: Mapping[str, PrivacyConfig],
    seed: int,
) -> tuple[AttackRow, ...]:
    """Attack each model.

    Args:
        recipe: of all sites' cases together.
        models: by name.
        train: cases that all of them were trained on.
        unseen: cases that none was.
        metric: the run's, without ``val/``.
        privacy: by name, what a model was trained under.
        seed: of the lots.

    Raises:
        PrivacyError: too few cases to tell anything.
    """
    rng = np.random.default_rng(seed)
    members, others = _some(train, rng), _some(unseen, rng)
    if min(len(members), len(others)) < FEWEST_CASES:
        raise PrivacyError(
            f"{len(members)} cases that were trained on and {len(others)} that were not: of fewer than {FEWEST_CASES} "
            "nothing can be told"
        )
    rows = []
    for name, networks in models.items():
        inside, outside = (_losses(recipe, networks, cases, metric) for cases in (members, others))
        found = membership_attack(
            inside[0],
            outside[0],
            groups=(inside[1], outside[1]),
            false_positives=FALSE_POSITIVES,
            seed=seed,
        )
        config = privacy[name]
        most = None
        if config.epsilon is not None:
            most = most_true_positives(config.epsilon, config.delta, FALSE_POSITIVES)
        rows.append(
            AttackRow(
                model=name,
                auc=Shown(value=found.auc, low=found.auc_low, high=found.auc_high),
                found=Shown(value=found.true_positives, low=found.true_positives_low, high=found.true_positives_high),
                false_positives=FALSE_POSITIVES,
                members=found.members,
                others=found.others,
                most=most,
            )
        )
    return tuple(rows)


def case_losses(scores: Scores) -> npt.NDArray[np.float64]:
    """(N,) of the cases of ``scores``: cross-entropy, summed over labels; one minus the mean Dice in segmentation."""
    if scores.task.dense:
        assert scores.dice is not None
        there = np.isfinite(scores.dice)
        # Where no class is there, nor predicted, all is right.
        sums, counts = np.where(there, scores.dice, 0.0).sum(1), there.sum(1)
        return np.where(counts > 0, 1 - sums / np.maximum(counts, 1), 0.0)
    targets, probability = scores.arrays
    p = np.clip(np.asarray(probability, np.float64), 1e-12, 1 - 1e-12)
    if targets.ndim == 2:  # several labels
        truth = np.asarray(targets, np.float64)
        return -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).sum(1)
    return -np.log(p[np.arange(len(p)), np.asarray(targets, np.int64)])


def _losses(
    recipe: Recipe, networks: Networks, cases: Sequence[int], metric: str
) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Each case judged by its own site's model, and whose case it is."""
    by_network: dict[int, list[int]] = {}
    homes = {index: networks[str(recipe.manifest.cases[index].site)] for index in cases}
    for index, network in homes.items():
        by_network.setdefault(id(network), []).append(index)
    found = []
    for indices in by_network.values():
        candidate = Candidate(name="attacked", members=(homes[indices[0]],))
        found.append(case_losses(choosing.score(recipe, [candidate], indices, metric=metric)["attacked"]))
    ordered = [index for indices in by_network.values() for index in indices]
    return np.concatenate(found), [recipe.manifest.cases[index].group for index in ordered]


def _some(cases: Sequence[int], rng: np.random.Generator) -> list[int]:
    if len(cases) <= MOST_CASES:
        return list(cases)
    return sorted(int(cases[k]) for k in rng.choice(len(cases), MOST_CASES, replace=False))
