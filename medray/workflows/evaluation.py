"""Score a bundle on labelled data, with intervals, and against another bundle: ``medray evaluate``."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medray.bundle.read import Bundle, RuntimeChoice
from medray.data.image import Image, Mask
from medray.data.layouts import build_manifest
from medray.data.manifest import IGNORE, Case, Manifest, Split
from medray.data.readers import read_case
from medray.data.writers.atomic import appearing
from medray.errors import BundleError, DataError, MedrayError
from medray.learn.intervals import Interval, bootstrap, paired_bootstrap
from medray.learn.metrics import confusion_matrix, dice_per_class, hd95_per_class, mean_over_cases
from medray.predict.predictor import Predictor

Array = npt.NDArray[Any]
Progress = Callable[[int, int, str], None]
"""(cases done, cases in all, the id of the last one)"""

DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """This bundle minus another one, on the same cases, patients drawn together."""

    other: str
    other_metrics: dict[str, Interval]
    difference: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a bundle is on labelled data.

    Attributes:
        metrics: by name: value and 95 % interval (bootstrap over patients). Segmentation: dice and hd95_mm (mean over
            cases of each class, then over classes), and each of them by class as ``dice/NAME``.
        sites: the same for each site, with its number of cases.
        confusion: (K, K) rows true, columns predicted; None but where a case has one class.
        rows: one dictionary a case: id, patient, site and its figures.
        failed: id and reason of cases that could not be scored; they count in no figure.
        notes: what a reader of the figures has to know.
    """

    bundle: str
    data: str
    kind: str
    runtime: str
    split: str
    cases: int
    patients: int
    metrics: dict[str, Interval]
    sites: dict[str, dict[str, Any]]
    comparison: Comparison | None
    confusion: list[list[int]] | None
    rows: tuple[dict[str, Any], ...]
    failed: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    intended_use: str

    def save(self, directory: Path) -> None:
        """Write ``evaluation.json`` (all of it; what is not a number becomes null) and ``cases.csv``, a row a case."""
        directory.mkdir(parents=True, exist_ok=True)
        with appearing(directory / "evaluation.json") as partial:
            partial.write_text(json.dumps(_plain(asdict(self)), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with appearing(directory / "cases.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


@dataclass(frozen=True)
class _Scores:
    """Of one bundle on the cases that could be scored: arrays with a row a case, and what is measured of them."""

    arrays: tuple[Array, ...]
    statistics: dict[str, Callable[..., float]]


def evaluate(
    bundle: Bundle | Path | str,
    data: str | Manifest,
    *,
    runtime: RuntimeChoice = "torch",
    device: Literal["cpu", "cuda"] = "cpu",
    compare: Bundle | Path | str | None = None,
    split: Split | Literal["auto", "all"] = "auto",
    cases: Sequence[int] | None = None,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a bundle.

    Args:
        bundle: opened, or its folder.
        data: a manifest, the path of a ``manifest.json``, or any data source.
        runtime, device: as for prediction.
        compare: another bundle of the same task and classes: the same cases, compared pairwise.
        split: auto takes the test cases where the data name any, and all others else.
        cases: indices into the manifest's cases, instead of ``split``.
        out: folder for ``evaluation.json`` and ``cases.csv``.
        seed: of the bootstrap.
        progress: called after each case.

    Raises:
        DataError: no labelled case, or classes that are not the bundle's.
        BundleError: a bundle that can't be used here, or two that can't be compared.
    """
    ours = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    theirs = compare if isinstance(compare, Bundle) or compare is None else Bundle.open(compare)
    manifest = _manifest(data, ours.spec.kind)
    notes: list[str] = []
    mapping = _mapping(manifest, ours, notes)
    if theirs is not None and (theirs.spec.kind, theirs.spec.classes) != (ours.spec.kind, ours.spec.classes):
        raise DataError(
            f"bundles {ours.spec.name!r} and {theirs.spec.name!r} differ in task or classes and can't be compared: "
            f"{ours.spec.kind} of {ours.spec.classes} and {theirs.spec.kind} of {theirs.spec.classes}"
        )
    chosen, shown = _choose(manifest, split, cases)
    if shown == "all" and _trained_on(ours) == manifest.source:
        notes.append("The bundle was trained on cases of these same data: the figures are optimistic.")
    engines = [(each, each.predictor(runtime, device=device)) for each in (ours, theirs) if each is not None]
    kept: list[Case] = []
    failed: list[tuple[str, str]] = []
    results: list[list[tuple[Array, ...]]] = [[] for _ in engines]
    for count, case in enumerate(chosen, start=1):
        try:
            image, mask, valid = read_case(case, Path(manifest.root))
            scored = [_score(each, engine, case, image, mask, valid, mapping) for each, engine in engines]
        except MedrayError as error:
            failed.append((case.id, str(error)))
        else:
            kept.append(case)
            for rows, row in zip(results, scored, strict=True):
                rows.append(row)
        if progress is not None:
            progress(count, len(chosen), case.id)
    if not kept:
        raise DataError(f"{manifest.source}: none of {len(chosen)} cases could be scored. The first: {failed[0][1]}")
    scores = [_scores(ours, rows) for rows in results]
    groups = [case.group for case in kept]
    result = Evaluation(
        bundle=ours.spec.name,
        data=manifest.source,
        kind=ours.spec.kind,
        runtime=f"{engines[0][1].name} {engines[0][1].precision}",
        split=shown,
        cases=len(kept),
        patients=len(set(groups)),
        metrics=_measure(scores[0], groups, seed),
        sites=_by_site(scores[0], kept, seed),
        comparison=None
        if theirs is None
        else Comparison(
            other=theirs.spec.name,
            other_metrics=_measure(scores[1], groups, seed),
            difference={
                name: paired_bootstrap(scores[0].arrays, scores[1].arrays, groups, statistic, n=DRAWS, seed=seed)
                for name, statistic in scores[0].statistics.items()
            },
        ),
        confusion=_confusion(ours, results[0]),
        rows=tuple(_row(ours, case, row) for case, row in zip(kept, results[0], strict=True)),
        failed=tuple(failed),
        notes=tuple(notes),
        intended_use=ours.spec.intended_use,
    )
    if out is not None:
        result.save(out)
    return result


def _trained_on(bundle: Bundle) -> str | None:
    """The data source of the bundle's own experiment, where it is told."""
    import yaml

    if "experiment.yaml" not in bundle.spec.files:
        return None
    path = bundle.directory / "experiment.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BundleError(f"{path}: can't be read ({error}). Write the bundle anew") from None
    return tree.get("data") if isinstance(tree, dict) else None


def _manifest(data: str | Manifest, kind: str) -> Manifest:
    found = data if isinstance(data, Manifest) else build_manifest(data, task=kind)
    if found.task != kind:
        raise DataError(
            f"{found.source}: its task is {found.task}, the bundle's {kind}. Give data of the bundle's task"
        )
    return found


def _mapping(manifest: Manifest, bundle: Bundle, notes: list[str]) -> Array:
    """For each class of the data, its index in the bundle: by name, or by order where no name is known."""
    known = {name: index for index, name in enumerate(bundle.spec.classes)}
    named = [known.get(name) for name in manifest.classes]
    if bundle.spec.task.dense:
        named[0] = 0  # background, whatever it is called
    missing = [name for name, index in zip(manifest.classes, named, strict=True) if index is None]
    if not missing:
        return np.array(named)
    if len(manifest.classes) == len(known) and not set(manifest.classes[1:]) & set(known):
        notes.append(
            f"The data name their classes {', '.join(manifest.classes)}, the bundle {', '.join(bundle.spec.classes)}: "
            "they were taken to be the same in this order."
        )
        return np.arange(len(known))
    raise DataError(
        f"{manifest.source}: classes {', '.join(missing)} are unknown to bundle {bundle.spec.name!r} "
        f"(it knows {', '.join(bundle.spec.classes)}). Rename the data's classes"
    )


def _choose(manifest: Manifest, split: str, cases: Sequence[int] | None) -> tuple[list[Case], str]:
    labelled = [case for case in manifest.cases if case.label is not None or case.mask is not None]
    if cases is not None:
        chosen, shown = [manifest.cases[index] for index in cases], "as given"
    elif split == "all":
        chosen, shown = labelled, "all"
    elif split == "auto":
        held = [case for case in labelled if case.split == "test"]
        chosen, shown = (held, "test") if held else (labelled, "all")
    else:
        chosen, shown = [case for case in labelled if case.split == split], split
    if not chosen:
        raise DataError(f"{manifest.source}: no labelled case in split {shown!r}. Use split=all, or add labels")
    return chosen, shown


def _score(
    bundle: Bundle,
    engine: Predictor,
    case: Case,
    image: Image,
    mask: Mask | None,
    valid: Mask | None,
    mapping: Array,
) -> tuple[Array, ...]:
    """Segmentation: (Dice (K-1,), HD95 in mm (K-1,)). Else: (target, probabilities (K,))."""
    found = bundle.predict(image, engine)
    if not bundle.spec.task.dense:
        assert found.probabilities is not None
        if case.label is None:
            raise DataError(f"case {case.id}: has no label")
        if isinstance(case.label, int):
            return np.asarray(mapping[case.label]), found.probabilities
        target = np.zeros(len(bundle.spec.classes), dtype=np.int64)
        target[mapping] = case.label
        return target, found.probabilities
    if mask is None or found.labels is None:
        raise DataError(f"case {case.id}: has no mask")
    truth = mask.array.astype(np.int64)
    if truth.shape != found.labels.shape:
        raise DataError(f"case {case.id}: its mask has shape {truth.shape}, its image {found.labels.shape}")
    ignored = truth == IGNORE
    if valid is not None:
        ignored |= valid.array == 0
    if (truth[~ignored] >= len(mapping)).any() or (truth < 0).any():
        raise DataError(f"case {case.id}: its mask holds labels beyond the {len(mapping)} classes of the data")
    truth = np.where(ignored, IGNORE, mapping[np.where(ignored, 0, truth)])
    classes = len(bundle.spec.classes)
    return (
        dice_per_class(found.labels, truth, classes),
        hd95_per_class(found.labels, truth, classes, image.spacing),
    )


class _Remembered:
    """All measures at once, kept for each draw: the bootstrap of each measure draws the same cases."""

    def __init__(self, measure: Callable[[Array, Array], dict[str, float]]) -> None:
        self._measure = measure
        self._known: dict[bytes, dict[str, float]] = {}

    def __call__(self, truth: Array, probabilities: Array) -> dict[str, float]:
        key = hashlib.blake2b(truth.tobytes() + probabilities.tobytes(), digest_size=16).digest()
        if key not in self._known:
            self._known[key] = self._measure(truth, probabilities)
        return self._known[key]


def _scores(bundle: Bundle, rows: list[tuple[Array, ...]]) -> _Scores:
    arrays = tuple(np.stack([row[part] for row in rows]) for part in range(2))
    spec, task = bundle.spec, bundle.spec.task
    statistics: dict[str, Callable[..., float]] = {}
    if task.dense:
        statistics["dice"] = lambda dice, _: mean_over_cases(dice)
        statistics["hd95_mm"] = lambda _, distance: mean_over_cases(distance)
        for index, name in enumerate(spec.classes[1:]):
            statistics[f"dice/{name}"] = lambda dice, _, index=index: mean_over_cases(dice[:, index : index + 1])
            statistics[f"hd95_mm/{name}"] = lambda _, far, index=index: mean_over_cases(far[:, index : index + 1])
    else:
        whole = _Remembered(lambda truth, p: task.measures(truth, p, spec.thresholds))
        for name in task.evaluated:
            statistics[name] = lambda truth, p, name=name: whole(truth, p)[name]
    return _Scores(arrays, statistics)


def _measure(scores: _Scores, groups: Sequence[str], seed: int) -> dict[str, Interval]:
    return {
        name: bootstrap(scores.arrays, statistic, groups=groups, n=DRAWS, seed=seed)
        for name, statistic in scores.statistics.items()
    }


def _by_site(scores: _Scores, cases: Sequence[Case], seed: int) -> dict[str, dict[str, Any]]:
    sites = sorted({case.site for case in cases if case.site is not None})
    table: dict[str, dict[str, Any]] = {}
    for site in sites if len(sites) > 1 else []:
        rows = np.array([index for index, case in enumerate(cases) if case.site == site])
        part = _Scores(tuple(array[rows] for array in scores.arrays), scores.statistics)
        groups = [cases[index].group for index in rows]
        table[site] = {"cases": len(rows), "patients": len(set(groups)), "metrics": _measure(part, groups, seed)}
    return table


def _confusion(bundle: Bundle, rows: list[tuple[Array, ...]]) -> list[list[int]] | None:
    if bundle.spec.task.target != "class":
        return None
    labels = np.array([int(label) for label, _ in rows])
    predicted = bundle.spec.task.decide(np.stack([p for _, p in rows]))
    matrix: list[list[int]] = confusion_matrix(labels, predicted, len(bundle.spec.classes)).tolist()
    return matrix


def _row(bundle: Bundle, case: Case, row: tuple[Array, ...]) -> dict[str, Any]:
    spec = bundle.spec
    found: dict[str, Any] = {"id": case.id, "patient": case.patient, "site": case.site}
    if spec.task.dense:
        for name, dice, distance in zip(spec.classes[1:], *row, strict=True):
            found |= {f"dice/{name}": float(dice), f"hd95_mm/{name}": float(distance)}
        return found
    target, probability = row
    found["label"] = target.tolist()
    return found | {f"p_{name}": float(p) for name, p in zip(spec.classes, probability, strict=True)}


def _plain(value: Any) -> Any:
    """For JSON: intervals as {value, low, high}, NaN as null."""
    if isinstance(value, Interval):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
