"""Ensembles of networks that are there already, made from what they said of the validation cases. Nothing is trained.

- greedy: members are added, with replacement, as long as the study's metric rises (Caruana et al., Ensemble selection
  from libraries of models, ICML 2004). The library is the finalists, and the trials whose predictions were kept.
- stack: the mixture of their probabilities that explains the cases best, by EM, held towards equal weights by a
  Dirichlet prior (Yao et al., Using stacking to average Bayesian predictive distributions, 2018).
- vote: their decisions, counted; of classifiers.
- greedy soup: weights averaged one network after another, where validation gains by it (Wortsman et al., 2022).

The first two are fitted to validation cases, so that they are judged there by cross-fitting over patients: each case by
weights that were fitted without its patient. Every one of them exports as one bundle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.data.manifest import IGNORE
from medray.learn.metrics import mean_over_cases
from medray.predict.predictor import probabilities
from medray.tasks.catalogue import find_task
from medray.tasks.task import Direction
from medray.workflows.champion import Answers, Candidate, Scores, score, sees_alike, soup_of
from medray.workflows.predictions import load_predictions
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, Trained, outputs

Table = npt.NDArray[np.float64]

FOLDS = 5
FEWEST_PATIENTS = 8
"""Validation patients under which weights would be fitted to chance."""
PICKS = 12
MOST = 6
"""Members of an ensemble: each costs its whole latency."""
ROWS = 100_000
"""Voxels that weights are fitted to, about, at most."""
PATIENCE = 10.0
"""Seconds that greedy selection may take; of many cases and a slow metric it isn't tried."""
PRIOR = 10.0
"""Cases that the equal weights of a stack count for."""
LEAST = 0.03
"""Weight under which a member is left out: it costs more than it says."""


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What L networks said of the validation cases, in rows: cases, or sampled voxels of them.

    Attributes:
        shares: (L, R, K) probabilities.
        targets: (R,) or (R, K).
        case: (R,) position of each row's case.
        groups: (N,) the patient of each case.
    """

    kind: str
    metric: str
    shares: Table
    targets: npt.NDArray[np.int64]
    case: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_]

    def of(self, cases: npt.NDArray[np.bool_]) -> _Said:
        """The rows of some cases, given as a mask over all."""
        rows = cases[self.case]
        return replace(self, shares=self.shares[:, rows], targets=self.targets[rows], case=self.case[rows])

    def value(self, shares: Table) -> float:
        """The study's metric of mixed probabilities (R, K); of voxels, Dice over all that were sampled."""
        task = find_task(self.kind)
        if not task.dense:
            return task.measure(self.metric, self.targets, shares)
        found, classes = shares.argmax(axis=1), shares.shape[1]
        dice = []
        for k in range(1, classes):
            ours, truth = found == k, self.targets == k
            both = int(ours.sum() + truth.sum())
            dice.append(2 * int((ours & truth).sum()) / both if both else np.nan)
        return mean_over_cases(np.asarray([dice]))


Fit = Callable[[_Said], Table]
"""From what was said to weights (L,) of sum 1."""


def greedy(direction: Direction) -> Fit:
    """Weights by greedy selection with replacement, from the best network on."""
    sign = 1.0 if direction == "max" else -1.0

    def fit(said: _Said) -> Table:
        def worth(shares: Table) -> float:
            found = sign * said.value(shares)
            return found if np.isfinite(found) else -np.inf

        picks = np.zeros(len(said.shares))
        first = int(np.argmax([worth(shares) for shares in said.shares]))
        picks[first], total, best = 1.0, said.shares[first].copy(), worth(said.shares[first])
        for count in range(2, PICKS + 1):
            full = np.count_nonzero(picks) >= MOST
            values = [
                -np.inf if full and not picks[place] else worth((total + shares) / count)
                for place, shares in enumerate(said.shares)
            ]
            place = int(np.argmax(values))
            if not values[place] > best:
                break
            picks[place], total, best = picks[place] + 1, total + said.shares[place], values[place]
        return np.asarray(picks / picks.sum())

    return fit


def stack(said: _Said) -> Table:
    """Weights of the mixture with the highest likelihood, each case counting once, under the prior."""
    members = len(said.shares)
    if said.targets.ndim == 2:  # several labels
        truth = said.targets.astype(bool)
        likelihood = np.where(truth, said.shares, 1 - said.shares).reshape(members, -1)
        case = np.repeat(said.case, said.targets.shape[1])
    else:
        likelihood = said.shares[:, np.arange(len(said.targets)), said.targets]
        case = said.case
    likelihood = np.maximum(likelihood, 1e-9)
    once = 1.0 / np.bincount(case)[case]
    weights = np.full(members, 1 / members)
    for _ in range(200):
        part = weights[:, None] * likelihood
        found = (part / part.sum(axis=0) * once).sum(axis=1) + PRIOR / members
        found /= found.sum()
        if np.abs(found - weights).max() < 1e-6:
            break
        weights = found
    order = np.argsort(weights)[::-1]
    weights[order[MOST:]] = 0.0
    weights[weights < LEAST] = 0.0
    return np.asarray(weights / weights.sum())


def cross_fitted(fit: Fit, said: _Said) -> tuple[Table, dict[int, Table]]:
    """Weights fitted on all cases, and for each case (by position) those fitted without its patient's fold."""
    names = np.unique(said.groups)
    np.random.default_rng(0).shuffle(names)
    fold_of = {name: place % FOLDS for place, name in enumerate(names)}
    folds = np.asarray([fold_of[group] for group in said.groups])
    by_case: dict[int, Table] = {}
    for fold in range(FOLDS):
        weights = fit(said.of(folds != fold))
        by_case |= {int(place): weights for place in np.flatnonzero(folds == fold)}
    return fit(said), by_case


def further(
    recipe: Recipe,
    singles: Sequence[tuple[str, Trained]],
    scores: Mapping[str, Scores],
    known: Answers,
    *,
    direction: Direction,
    library: Sequence[tuple[str, Trained]] = (),
) -> tuple[list[Candidate], dict[str, Scores]]:
    """Ensembles by votes, by greedy selection and by stacking, with their scores on the validation cases.

    Args:
        recipe: of the study.
        singles: the finalists.
        scores: of each, by name, on the validation cases.
        known: what they said of these.
        direction: of the metric.
        library: trials whose predictions of the validation cases were kept.

    Returns:
        candidates to export, and their scores: of the fitted ones, cross-fitted.
    """
    lead = scores[singles[0][0]]
    networks = _library(recipe, singles, library, lead, known)
    if len(networks) < 2 or not known.whole(networks, lead.indices):
        return [], {}
    found: list[tuple[Candidate, Candidate]] = []  # to judge, to export
    flips = any(network.experiment.inference.tta for network in networks)
    finalists = networks[: len([1 for _, trained in singles if sees_alike(trained, networks[0])])]
    if not lead.task.dense and not flips and len(finalists) > 2:
        vote = Candidate(name=f"vote of {len(finalists)}", members=tuple(finalists), rule="vote")
        found.append((vote, vote))
    if len(set(lead.groups.tolist())) >= FEWEST_PATIENTS:
        said = _said(recipe, networks, lead, known)
        began = time.monotonic()
        said.value(said.shares[0])
        once = time.monotonic() - began
        for name, fit in (("greedy", greedy(direction)), ("stack", stack)):
            if name == "greedy" and once * PICKS * len(networks) * (FOLDS + 1) > PATIENCE:
                continue
            weights, by_case = cross_fitted(fit, said)
            kept = np.flatnonzero(weights)
            if len(kept) < 2:
                continue
            name = f"{name} of {len(kept)}"
            judged = {lead.indices[place]: tuple(map(float, row)) for place, row in by_case.items()}
            found.append(
                (
                    Candidate(name=name, members=tuple(networks), by_case=judged),
                    Candidate(
                        name=name,
                        members=tuple(networks[place] for place in kept),
                        weights=tuple(float(weights[place]) for place in kept),
                    ),
                )
            )
    if not found:
        return [], {}
    judged_scores = score(recipe, [pair[0] for pair in found], lead.indices, metric=lead.metric, known=known)
    return [pair[1] for pair in found], judged_scores


def greedy_soup(
    recipe: Recipe,
    singles: Sequence[tuple[str, Trained]],
    scores: Mapping[str, Scores],
    *,
    direction: Direction,
    spare: Callable[[], bool],
    known: Answers,
) -> tuple[Candidate, Scores] | None:
    """The soup that grows, best network first, by those with which validation gains; None where none is better.

    Each try runs one network over the validation cases, so it ends where there is no time to ``spare``.
    """
    sign = 1.0 if direction == "max" else -1.0
    order = sorted(singles, key=lambda pair: -sign * scores[pair[0]].value)
    if len(order) < 3:
        return None  # of two there is the one soup, which stands already
    name, first = order[0]
    inside, best, soup = [first], scores[name], None
    for _, trained in order[1:]:
        same = sees_alike(trained, first) and trained.experiment.model == first.experiment.model
        if not same or not spare():
            continue
        mixed = soup_of(recipe, [*inside, trained])
        if mixed is None:
            return None
        candidate = Candidate(name="soup", members=(mixed,))
        found = score(recipe, [candidate], best.indices, metric=best.metric, known=known)["soup"]
        if sign * found.value > sign * best.value:
            inside, best, soup = [*inside, trained], found, mixed
    if soup is None:
        return None
    return Candidate(name=f"greedy soup of {len(inside)}", members=(soup,)), best


def _library(
    recipe: Recipe,
    singles: Sequence[tuple[str, Trained]],
    library: Sequence[tuple[str, Trained]],
    lead: Scores,
    known: Answers,
) -> list[Network]:
    """The finalists that see images as the first does, then such trials; their predictions are put into ``known``."""
    first = singles[0][1]
    networks: list[Network] = [trained for _, trained in singles if sees_alike(trained, first)]
    for _, trained in library if not lead.task.dense else ():
        if not sees_alike(trained, first):
            continue
        rows = load_predictions(trained.directory, lead.indices, outputs=outputs(recipe.manifest))
        if rows is not None:
            for index, row in zip(lead.indices, rows, strict=True):
                known.put(trained, index, row)
            networks.append(trained)
    return networks


def _said(recipe: Recipe, networks: Sequence[Network], lead: Scores, known: Answers) -> _Said:
    targets, case = lead.targets, np.arange(len(lead.indices))
    assert targets is not None
    if lead.task.dense:
        # The same voxels of every network: they are drawn by the case's number.
        alone = [Candidate(name=str(place), members=(network,)) for place, network in enumerate(networks)]
        found = score(recipe, alone, lead.indices, metric=lead.metric, known=known)
        logits: list[Any] = [found[candidate.name].logits for candidate in alone]
        case = np.repeat(case, lead.sampled)
    else:
        logits = [np.stack([known.get(network, index) for index in lead.indices]) for network in networks]  # type: ignore[misc]
    shares = np.stack([probabilities(rows, lead.kind) for rows in logits]).astype(np.float64)
    seen = np.ones(len(case), bool) if targets.ndim == 2 else targets != IGNORE
    if lead.task.dense:
        seen &= np.arange(len(case)) % max(1, len(case) // ROWS) == 0
    return _Said(
        kind=lead.kind,
        metric=lead.metric,
        shares=shares[:, seen],
        targets=targets[seen],
        case=case[seen],
        groups=lead.groups,
    )
