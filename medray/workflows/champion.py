"""Who won, and by how much: candidates, their scores case by case, the choice, the gain.

The choice is made on validation cases alone. The gain over trial 0, retrained with the champion's own budget, is
measured on test cases, which were used for no choice; where there are none, on validation, and called optimistic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.bundle.ensemble import Rule
from medray.data.image import Image
from medray.data.manifest import IGNORE, Case
from medray.data.preprocess import Preprocessor
from medray.data.readers import read_case
from medray.learn.intervals import Interval, bootstrap, paired_bootstrap
from medray.learn.metrics import dice_per_class, hd95_per_class
from medray.models.catalogue import lookup
from medray.predict.calibration import fit_temperature, sample_voxels
from medray.predict.postprocess import keep_largest
from medray.predict.predictor import Floats, probabilities
from medray.predict.sliding import classify
from medray.tasks.catalogue import find_task
from medray.tasks.task import Direction, Task
from medray.train.precision import resolve_device
from medray.workflows.judging import predictor_of, segment_prepared
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, Trained, new_model

Corrupt = Callable[[Image], Image]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One network, or several whose probabilities are averaged, or whose votes are counted.

    Attributes:
        weights: of the members in the average, positive, of sum 1; None: all alike.
        by_case: weights of cases (by index) on which ``weights`` were fitted: there they would be judged by what they
            know. Those given here were fitted without the case's patient, and may be 0.
    """

    name: str
    members: tuple[Network, ...]
    weights: tuple[float, ...] | None = None
    rule: Rule = "mean"
    by_case: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def lead(self) -> Network:
        """The member whose experiment says how images are prepared and windows laid; all members agree on that."""
        return self.members[0]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one candidate did on N cases.

    Attributes:
        indices: of the manifest's cases.
        groups: (N,) the patient of each.
        dice, hd95: (N, K - 1) per foreground class, NaN where it is absent in both; segmentation.
        logits, targets: (N, O) and (N,) or (N, K). Voxel samples for calibration in segmentation.
        sampled: (N,) how many of those voxels are of each case; segmentation.
        temperature: divides the logits before anything is decided by them. What is said of a bundle is said at its own:
            grades, for one, may be others than at 1.
    """

    kind: str
    indices: tuple[int, ...]
    groups: npt.NDArray[np.str_]
    dice: npt.NDArray[np.float64] | None = None
    hd95: npt.NDArray[np.float64] | None = None
    logits: Floats | None = None
    targets: npt.NDArray[np.int64] | None = None
    sampled: tuple[int, ...] = ()
    metric: str = "dice"
    temperature: float = 1.0

    @property
    def task(self) -> Task:
        """What was scored."""
        return find_task(self.kind)

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """What :attr:`statistic` takes: rows are cases."""
        if self.task.dense:
            assert self.dice is not None
            return (self.dice,)
        assert self.logits is not None and self.targets is not None
        return self.targets, probabilities(self.logits, self.kind, self.temperature)

    def statistic(self, *arrays: npt.NDArray[Any]) -> float:
        """The study's metric of some rows; NaN where it isn't defined."""
        return self.task.measure(self.metric, *arrays)

    @property
    def value(self) -> float:
        """The study's metric over all cases."""
        return self.statistic(*self.arrays)

    @property
    def tie(self) -> float:
        """The more of it, the better between equals; 0 where the task has no such figure, the least where it isn't
        defined."""
        if self.task.tie is None:
            return 0.0
        found = self.task.measure(self.task.tie, *self.arrays)
        return -found if np.isfinite(found) else -math.inf

    def interval(self, *, n: int = 2000) -> Interval:
        """The value with its 95 % bootstrap interval over patients, of ``n`` draws."""
        return bootstrap(self.arrays, self.statistic, groups=self.groups, n=n)

    def intervals(self) -> dict[str, Interval]:
        """Every metric that a report shows, each with its interval."""
        if self.task.dense:
            found = {"dice": self.interval()}
            if self.hd95 is not None:
                found["hd95"] = bootstrap(self.hd95, _nanmean, groups=self.groups)
            return found
        targets, probabilities = self.arrays
        names = self.task.measures(targets, probabilities)
        return {
            name: bootstrap(self.arrays, partial(self.task.measure, name), groups=self.groups, n=500) for name in names
        }


def _nanmean(table: npt.NDArray[Any]) -> float:
    finite = table[np.isfinite(table)]
    return float(finite.mean()) if finite.size else float("nan")


def candidates_of(recipe: Recipe, finalists: Sequence[tuple[str, Trained]], *, ensemble: bool) -> list[Candidate]:
    """The finalists, and what can be made of them without further training.

    Average: probabilities of all finalists that see images alike. Soup: the mean of the weights (Wortsman et al., Model
    soups, ICML 2022), of finalists with the same network and no batch statistics.
    """
    found = [Candidate(name=name, members=(trained,)) for name, trained in finalists]
    if not ensemble or len(finalists) < 2:
        return found
    lead = finalists[0][1]
    alike = [trained for _, trained in finalists if sees_alike(trained, lead)]
    if len(alike) > 1:
        found.append(Candidate(name=f"average of {len(alike)}", members=tuple(alike)))
        same = [trained for trained in alike if trained.experiment.model == lead.experiment.model]
        soup = soup_of(recipe, same) if len(same) > 1 else None
        if soup is not None:
            found.append(Candidate(name=f"soup of {len(same)}", members=(soup,)))
    return found


def sees_alike(one: Network, other: Network) -> bool:
    """Whether a bundle could prepare images and lay windows in one way for both."""
    a, b = one.experiment, other.experiment
    return a.preprocess == b.preprocess and a.train.patch_size == b.train.patch_size and a.inference == b.inference


def soup_of(recipe: Recipe, members: Sequence[Network]) -> Network | None:
    """The mean of the weights of networks of one kind; None where batch statistics can't be averaged."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in members[0].model.modules()):
        return None
    lead = members[0]
    states = [member.model.state_dict() for member in members]
    mean = {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
    model = new_model(lead.experiment, recipe.manifest)
    model.load_state_dict(mean)
    return Network(model=model.eval(), experiment=lead.experiment)


class Answers:
    """What networks said of cases, so that none runs twice on one, and how long each took.

    Args:
        limit: bytes that are kept; beyond, networks run again.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self._left, self._kept = limit, dict[tuple[int, int], Floats]()
        self._members: dict[int, Network] = {}  # kept alive, so that no other gets its id
        self._seconds: dict[int, list[float]] = {}

    def get(self, member: Network, index: int) -> Floats | None:
        """Logits (O,) or probabilities (K, *s) of a case, if they are kept."""
        return self._kept.get((id(member), index))

    def put(self, member: Network, index: int, answer: Floats, seconds: float | None = None) -> None:
        """Keep an answer, while there is room, and the time that it took."""
        self._members[id(member)] = member
        if seconds is not None:
            self._seconds.setdefault(id(member), []).append(seconds)
        if answer.nbytes <= self._left:
            self._left -= answer.nbytes
            self._kept[id(member), index] = answer

    def whole(self, members: Sequence[Network], indices: Sequence[int]) -> bool:
        """Whether nothing would have to run again."""
        return all((id(member), index) in self._kept for member in members for index in indices)

    def seconds(self, member: Network) -> float:
        """Median of one case, the network alone; NaN where it has not run."""
        return float(np.median(found)) if (found := self._seconds.get(id(member))) else math.nan


@dataclass(kw_only=True)
class _Tally:
    dice: list[npt.NDArray[np.float64]] = field(default_factory=list)
    hd95: list[npt.NDArray[np.float64]] = field(default_factory=list)
    logits: list[Floats] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)


def score(
    recipe: Recipe,
    candidates: Sequence[Candidate],
    indices: Sequence[int],
    *,
    metric: str,
    corrupt: Corrupt | None = None,
    distances: bool = False,
    stop: Callable[[], bool] = lambda: False,
    known: Answers | None = None,
) -> dict[str, Scores]:
    """Score candidates on cases, each on the image's own grid, each network running once a case whoever shares it.

    Args:
        recipe: whence the cases.
        candidates: of :func:`candidates_of`.
        indices: of the manifest's cases.
        metric: the study's objective without its ``val/``.
        corrupt: applied to an image as read, before preparation.
        distances: measure HD95 too (it costs more than Dice).
        stop: asked before each case; True ends early, with the cases so far.
        known: what networks said of these cases before, and where to keep what they say now; of cases as they are.
    """
    known = Answers(limit=0) if known is None else known
    manifest = recipe.manifest
    task, classes = find_task(manifest.task), len(manifest.classes)
    tallies = {candidate.name: _Tally() for candidate in candidates}
    done: list[int] = []
    members = {id(member): member for candidate in candidates for member in candidate.members}
    predictors = {
        key: predictor_of(member.model, member.experiment, resolve_device(member.experiment.device))
        for key, member in members.items()
    }
    for index in indices:
        if done and stop():
            break
        case = manifest.cases[index]
        image, mask, valid = read_case(case, Path(manifest.root))
        image = corrupt(image) if corrupt else image
        answers: dict[int, Floats] = {}
        prepared: dict[str, tuple[Floats, Any]] = {}
        for key, member in members.items():
            how = member.experiment.preprocess.model_dump_json()
            if how not in prepared:
                preprocessor = Preprocessor(
                    member.experiment.preprocess, ndim=manifest.ndim, channels=manifest.channels
                )
                prepared[how] = preprocessor.prepare(image)
            array, geometry = prepared[how]
            if (said := known.get(member, index)) is not None:
                answers[key] = said
                continue
            began = time.monotonic()
            if task.dense:
                answers[key] = segment_prepared(predictors[key], array, member.experiment)
            else:
                flips = member.experiment.augment.flip_axes if member.experiment.inference.tta else ()
                answers[key] = classify(predictors[key], array[None], flip_axes=flips)[0]
            known.put(member, index, answers[key], time.monotonic() - began)
        for candidate in candidates:
            tally = tallies[candidate.name]
            parts = [answers[id(member)] for member in candidate.members]
            weights = candidate.by_case.get(index, candidate.weights)
            if not task.dense:
                tally.logits.append(_mean_logits(parts, task, weights, candidate.rule))
                tally.targets.append(case.label)
                continue
            assert mask is not None
            lead = candidate.lead.experiment
            preprocessor = Preprocessor(lead.preprocess, ndim=manifest.ndim, channels=manifest.channels)
            array, geometry = prepared[lead.preprocess.model_dump_json()]
            mean = _mean(parts, weights)
            labels: npt.NDArray[Any] = preprocessor.restore_argmax(mean, geometry)
            if lead.inference.keep_largest:
                labels = keep_largest(labels, classes)
            truth = np.asarray(mask.array)
            if valid is not None:
                truth = np.where(np.asarray(valid.array) > 0, truth, IGNORE)
            tally.dice.append(dice_per_class(labels, truth, classes))
            if distances:
                spacing = image.spacing or (1.0,) * manifest.ndim
                tally.hd95.append(hd95_per_class(labels, truth, classes, spacing))
            target = preprocessor.prepare_mask(mask, geometry, valid)
            logits, targets = sample_voxels(mean, target, count=2000, seed=index)
            tally.logits.append(logits)
            tally.targets.append(targets)
            tally.sampled.append(len(targets))
        done.append(index)
    return {name: _collect(manifest.task, metric, tally, done, manifest.cases) for name, tally in tallies.items()}


def _collect(kind: str, metric: str, tally: _Tally, done: list[int], cases: Sequence[Case]) -> Scores:
    groups = np.asarray([cases[index].group for index in done])
    if find_task(kind).dense:
        return Scores(
            kind=kind,
            metric=metric,
            indices=tuple(done),
            groups=groups,
            dice=np.stack(tally.dice),
            hd95=np.stack(tally.hd95) if tally.hd95 else None,
            logits=np.concatenate(tally.logits),
            targets=np.concatenate(tally.targets),
            sampled=tuple(tally.sampled),
        )
    return Scores(
        kind=kind,
        metric=metric,
        indices=tuple(done),
        groups=groups,
        logits=np.stack(tally.logits),
        targets=np.asarray(tally.targets, dtype=np.int64),
    )


def _mean(parts: Sequence[Floats], weights: Sequence[float] | None = None) -> Floats:
    """Mean of probabilities, without holding more than one sum."""
    if len(parts) == 1:
        return parts[0]
    shares = [1 / len(parts)] * len(parts) if weights is None else weights
    total = np.float32(shares[0]) * parts[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        if share:
            total += np.float32(share) * part
    return total


def _mean_logits(
    parts: Sequence[Floats], task: Task, weights: Sequence[float] | None = None, rule: Rule = "mean"
) -> Floats:
    """Logits of the mean probability, or of the votes, as :class:`medray.bundle.ensemble.EnsembleModel` gives them."""
    if len(parts) == 1:
        return parts[0]
    logits = [torch.from_numpy(part[None].astype(np.float64)) for part in parts]
    if rule == "vote":
        mixed = task.vote(logits)
    else:
        shares = torch.tensor([1 / len(parts)] * len(parts) if weights is None else list(weights), dtype=torch.float64)
        mixed = task.mix(logits, shares.log())
    found: Floats = mixed[0].numpy().astype(np.float32)
    return found


def choose(scores: Mapping[str, Scores], first: str, direction: Direction) -> str:
    """The candidate with the best validation score; on a tie the better calibrated, then the earlier one.

    Args:
        scores: by candidate, on validation cases.
        first: who wins where no score is defined.
        direction: of the metric, ``max`` or ``min``.
    """
    defined = [name for name, found in scores.items() if np.isfinite(found.value)]
    if not defined:
        return first
    sign = 1.0 if direction == "max" else -1.0

    def rank(name: str) -> tuple[float, float]:
        found = scores[name]
        return sign * round(found.value, 6), found.tie

    return max(defined, key=rank)


def temperature_of(scores: Scores) -> float:
    """Temperature fitted on validation cases."""
    assert scores.logits is not None and scores.targets is not None
    return fit_temperature(scores.logits, scores.targets, scores.kind)


def difference(champion: Scores, default: Scores, *, n: int = 2000) -> Interval:
    """Champion minus default, with a 95 % interval of the paired bootstrap over patients, of ``n`` draws."""
    return paired_bootstrap(champion.arrays, default.arrays, champion.groups, champion.statistic, n=n)


def labels_of(recipe: Recipe, candidate: Candidate, image: Image) -> npt.NDArray[Any]:
    """The label map of one image, on its own grid."""
    manifest, lead = recipe.manifest, candidate.lead.experiment
    preprocessor = Preprocessor(lead.preprocess, ndim=manifest.ndim, channels=manifest.channels)
    array, geometry = preprocessor.prepare(image)
    parts = [
        segment_prepared(predictor_of(m.model, m.experiment, resolve_device(m.experiment.device)), array, m.experiment)
        for m in candidate.members
    ]
    labels = preprocessor.restore_argmax(_mean(parts, candidate.weights), geometry)
    return keep_largest(labels, len(manifest.classes)) if lead.inference.keep_largest else labels


def divisor_of(candidate: Candidate, ndim: int) -> int:
    """The multiple that each axis of a whole image must have."""
    found = [lookup(m.experiment.model.name).divisor(m.experiment.model, ndim) for m in candidate.members]
    return int(np.lcm.reduce(found))
