"""From scores to the parts of a report: the data's summary, curves and tables of a classifier, cases of a segmenter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medray.data.readers import read_case
from medray.data.splits import Splits
from medray.learn.intervals import bootstrap
from medray.learn.metrics import (
    average_precision,
    binary_auc,
    confusion_matrix,
    ece,
    mean_over_cases,
    precision_recall_curve,
    reliability_curve,
    roc_curve,
)
from medray.predict.predictor import probabilities
from medray.report.data import (
    ClassificationResults,
    Curve,
    DataSummary,
    Interval,
    Picture,
    SegmentationCase,
    SegmentationResults,
)
from medray.workflows.champion import Candidate, Scores, labels_of
from medray.workflows.judging import spread
from medray.workflows.pictures import beside, show
from medray.workflows.recipe import Recipe

EXAMPLES = 6


def data_summary(recipe: Recipe, source: str, splits: Splits) -> DataSummary:
    """What the data are, with a few training images."""
    manifest, fingerprint = recipe.manifest, recipe.fingerprint
    examples = []
    for index in spread(splits.train, EXAMPLES if not manifest.columns else 0):
        case = manifest.cases[index]
        image, mask, _ = read_case(case, Path(manifest.root))
        caption = case.id if case.label is None else f"{case.id}: {_label_text(case.label, manifest.classes)}"
        examples.append(Picture(pixels=show(image, None if mask is None else np.asarray(mask.array)), caption=caption))
    spacing = fingerprint.spacing_median
    return DataSummary(
        source=source,
        task=manifest.task,
        ndim=manifest.ndim,
        modality=manifest.modality,
        classes=manifest.classes,
        cases=len(manifest.cases),
        patients=len({case.group for case in manifest.cases}),
        sites=dict(fingerprint.sites),
        splits={"train": len(splits.train), "validation": len(splits.val), "test": len(splits.test)},
        shape=" x ".join(str(n) for n in fingerprint.shape_median),
        spacing=" x ".join(f"{s:.3g}" for s in spacing) + " mm" if spacing else "none in the files",
        class_share=dict(fingerprint.class_fraction),
        findings=tuple((f.severity, f"{f.case or 'data set'}: {f.message}", f.fix) for f in manifest.findings),
        examples=tuple(examples),
    )


def _label_text(label: int | tuple[int, ...], classes: tuple[str, ...]) -> str:
    if isinstance(label, int):
        return classes[label]
    return ", ".join(name for name, on in zip(classes, label, strict=True) if on) or "none"


def classification_results(recipe: Recipe, scores: Scores, temperature: float) -> ClassificationResults:
    """Confusion, ROC, precision-recall, and reliability before and after temperature scaling."""
    assert scores.logits is not None and scores.targets is not None
    kind, task, classes, targets = scores.kind, scores.task, recipe.manifest.classes, scores.targets
    raw, calibrated = probabilities(scores.logits, kind), probabilities(scores.logits, kind, temperature)
    pairs = [task.confident(targets, p) for p in (raw, calibrated)]
    matrix = None
    if task.target == "class":
        matrix = confusion_matrix(targets, task.decide(calibrated), len(classes))
    roc, pr = [], []
    for name, truth, value in task.questions(targets, calibrated, classes):
        if not 0 < truth.sum() < len(truth):
            continue
        fpr, tpr, _ = roc_curve(truth, value)
        roc.append(Curve(name=name, x=fpr, y=tpr, area=binary_auc(truth, value)))
        precision, recall, _ = precision_recall_curve(truth, value)
        pr.append(Curve(name=name, x=recall, y=precision, area=average_precision(truth, value)))
    reliability = []
    errors = []
    for name, (confidence, correct) in zip(("before", "after"), pairs, strict=True):
        x, y, _ = reliability_curve(confidence, correct)
        errors.append(ece(confidence, correct))
        reliability.append(Curve(name=name, x=x, y=y, area=errors[-1]))
    return ClassificationResults(
        confusion=matrix,
        roc=tuple(roc),
        pr=tuple(pr),
        reliability=tuple(reliability),
        ece=(errors[0], errors[1]),
        temperature=temperature,
    )


def segmentation_results(recipe: Recipe, champion: Candidate, scores: Scores) -> SegmentationResults:
    """Dice and HD95 case by case, and the best, median and worst case as pictures."""
    assert scores.dice is not None
    manifest = recipe.manifest
    distances = scores.hd95 if scores.hd95 is not None else np.full(scores.dice.shape, np.nan)
    rows = tuple(
        SegmentationCase(
            case=manifest.cases[index].id,
            patient=manifest.cases[index].group,
            site=manifest.cases[index].site or "",
            dice=tuple(float(v) for v in dice),
            hd95=tuple(float(v) for v in distance),
        )
        for index, dice, distance in zip(scores.indices, scores.dice, distances, strict=True)
    )
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(scores.dice)
        means = np.where(finite.any(1), np.nansum(scores.dice, 1) / np.maximum(finite.sum(1), 1), 1.0)
    order = np.argsort(means)[::-1]
    overlays = []
    for title, place in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        case = manifest.cases[scores.indices[int(place)]]
        image, mask, _ = read_case(case, Path(manifest.root))
        assert mask is not None
        answer = labels_of(recipe, champion, image)
        caption = f"{title}: {case.id}, Dice {means[int(place)]:.3f}. Left: reference, right: model"
        overlays.append(Picture(pixels=beside(image, np.asarray(mask.array), answer), caption=caption))
    per_class = {}
    for position, name in enumerate(manifest.classes[1:]):
        found = bootstrap(scores.dice[:, position : position + 1], mean_over_cases, groups=scores.groups)
        per_class[name] = Interval(value=found.value, low=found.low, high=found.high)
    has_spacing = recipe.fingerprint.spacing_median is not None
    return SegmentationResults(
        cases=rows, overlays=tuple(overlays), per_class=per_class, hd95_unit="mm" if has_spacing else "pixels"
    )
