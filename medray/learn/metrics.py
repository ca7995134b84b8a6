"""Metrics: pure functions of NumPy arrays.

Segmentation, of one case: ``pred`` and ``target`` are label maps (*spatial), background 0; classes 1..K-1 are measured.
Classification, of N cases: ``labels`` (N,) ints and ``probabilities`` (N, K); multilabel: both (N, K).

A class that says nothing (absent from prediction and target, or from all labels) is NaN, and means leave it out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "accuracy",
    "average_precision",
    "balanced_accuracy",
    "binary_auc",
    "brier",
    "classification_metrics",
    "confusion_matrix",
    "dice_per_class",
    "ece",
    "entropy",
    "hd95",
    "hd95_per_class",
    "log_loss",
    "macro",
    "mean_over_cases",
    "multilabel_metrics",
    "precision_recall_curve",
    "reliability_curve",
    "roc_curve",
    "sensitivity_specificity",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
CHUNK = 2**22
"""Voxels counted at once."""


# -- segmentation


def dice_per_class(pred: Array, target: Array, num_classes: int, ignore: int = 255) -> Floats:
    """Dice of each foreground class, (K-1,); NaN where a class is in neither. Voxels whose target is ``ignore`` don't
    count."""
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    pred, target = np.ravel(pred), np.ravel(target)
    for start in range(0, target.size, CHUNK):  # the index below is eight times as wide as a label map
        there, guess = target[start : start + CHUNK], pred[start : start + CHUNK]
        known = there != ignore
        table += confusion_matrix(there[known], guess[known], num_classes)
    hit, sizes = np.diag(table)[1:], (table.sum(0) + table.sum(1))[1:]
    return np.divide(2.0 * hit, sizes, out=np.full(num_classes - 1, np.nan), where=sizes > 0)


def hd95(pred: Array, target: Array, spacing: Sequence[float] | None = None) -> float:
    """The 95th percentile of the Hausdorff distance between two binary masks, the larger of both directions (as MONAI).

    Args:
        pred, target: (*spatial), true inside.
        spacing: mm of each axis; None for voxels.

    Returns:
        mm. NaN where both are empty; where one is, the image's diagonal, the worst that could be.
    """
    pred, target = pred.astype(bool), target.astype(bool)
    steps = np.asarray(spacing if spacing is not None else (1.0,) * pred.ndim, dtype=np.float64)
    if not pred.any() or not target.any():
        none = not pred.any() and not target.any()
        return float("nan") if none else float(np.linalg.norm(np.array(pred.shape) * steps))
    import torch
    from monai.metrics import compute_hausdorff_distance

    # Distances depend on the joint box of both masks alone; a border of one voxel keeps the surface where it was.
    both = pred | target
    box = []
    for axis in range(pred.ndim):
        inside = np.flatnonzero(both.any(axis=tuple(a for a in range(pred.ndim) if a != axis)))
        box.append(slice(max(0, int(inside[0]) - 1), int(inside[-1]) + 2))
    masks = [torch.from_numpy(np.ascontiguousarray(m[tuple(box)]))[None, None] for m in (pred, target)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls a deprecated parameter of its own
        value = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=steps.tolist())
    return float(value)


def hd95_per_class(
    pred: Array, target: Array, num_classes: int, spacing: Sequence[float] | None = None, ignore: int = 255
) -> Floats:
    """:func:`hd95` of each foreground class, (K-1,); voxels whose target is ``ignore`` are background on both sides."""
    known = target != ignore
    return np.array([hd95((pred == c) & known, (target == c) & known, spacing) for c in range(1, num_classes)])


def mean_over_cases(values: Array) -> float:
    """The mean over cases of each class, then over classes, of (N, K) values with NaNs left out; NaN if there is
    nothing else."""
    values = np.asarray(values, dtype=np.float64)
    counts = (~np.isnan(values)).sum(0)
    if not counts.any():
        return float("nan")
    return float((np.nansum(values, 0)[counts > 0] / counts[counts > 0]).mean())


# -- classification


def binary_auc(truth: Array, score: Array) -> float:
    """Area under the ROC curve by the rank sum (Mann-Whitney), ties shared; NaN where only one class is there."""
    truth = np.asarray(truth).astype(bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(np.asarray(score), return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    total = ranks[place.reshape(-1)[truth]].sum()
    return float((total - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(truth: Array, score: Array) -> float:
    """Area under the precision-recall curve as a sum of steps; NaN without a positive."""
    precision, recall, _ = precision_recall_curve(truth, score)
    return float("nan") if np.isnan(recall).any() else float((np.diff(recall, prepend=0.0) * precision).sum())


def macro(measure: Any, truth: Array, probabilities: Array) -> float:
    """Mean of a binary ``measure(truth (N,), score (N,))`` over the columns of (N, K), NaNs left out."""
    values = np.array([measure(truth[:, k], probabilities[:, k]) for k in range(truth.shape[1])])
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def confusion_matrix(labels: Array, predicted: Array, num_classes: int) -> npt.NDArray[np.int64]:
    """(K, K) counts: rows are true classes, columns predicted ones."""
    index = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(labels: Array, predicted: Array) -> float:
    """Share of equal entries; for multilabel over all (case, label) pairs."""
    return float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def sensitivity_specificity(matrix: Array) -> tuple[Floats, Floats]:
    """Of each class against the rest, (K,) each, from a confusion matrix; NaN where there is nothing to find."""
    matrix = np.asarray(matrix, dtype=np.float64)
    hit, there, guessed, total = np.diag(matrix), matrix.sum(1), matrix.sum(0), matrix.sum()
    return _ratio(hit, there), _ratio(total - there - guessed + hit, total - there)


def balanced_accuracy(matrix: Array) -> float:
    """Mean sensitivity of the classes that occur."""
    return _mean(sensitivity_specificity(matrix)[0])


def brier(truth: Array, probabilities: Array) -> float:
    """Mean over cases of the squared distance to the one-hot truth, summed over classes (Brier 1950: 0..2)."""
    return float(((np.asarray(probabilities) - truth) ** 2).sum(1).mean())


def log_loss(truth: Array, probabilities: Array) -> float:
    """Mean over cases of -sum(truth * log p), in nats, p not below 1e-7."""
    return float(-(truth * np.log(np.clip(probabilities, 1e-7, 1.0))).sum(1).mean())


def ece(confidence: Array, correct: Array, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): mean gap between confidence and hit rate,
    equal-width bins."""
    mean_confidence, hit_rate, counts = reliability_curve(confidence, correct, bins)
    return float((counts * np.abs(mean_confidence - hit_rate)).sum() / max(1, counts.sum()))


def entropy(probabilities: Array) -> npt.NDArray[np.float32]:
    """Entropy over the first axis (K, ...), divided by that of the even distribution: 0 certain, 1 no idea."""
    p = np.clip(probabilities, 1e-8, 1.0)
    return np.asarray(-(p * np.log(p)).sum(axis=0) / np.log(len(p)), dtype=np.float32)


# -- curves, for plots


def reliability_curve(confidence: Array, correct: Array, bins: int = 15) -> tuple[Floats, Floats, Floats]:
    """Of the bins that aren't empty: mean confidence, hit rate, count."""
    confidence = np.asarray(confidence, dtype=np.float64).ravel()
    correct = np.asarray(correct, dtype=np.float64).ravel()
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins).astype(np.float64)
    sums = [np.bincount(place, weights=w, minlength=bins) for w in (confidence, correct)]
    used = counts > 0
    return sums[0][used] / counts[used], sums[1][used] / counts[used], counts[used]


def roc_curve(truth: Array, score: Array) -> tuple[Floats, Floats, Floats]:
    """False positive rate, true positive rate and thresholds (score >= threshold), from (0, 0) at infinity to (1,
    1)."""
    hits, guesses, thresholds = _sweep(truth, score)
    positives = float(np.asarray(truth).astype(bool).sum())
    negatives = float(np.asarray(truth).size - positives)
    tpr = _ratio(hits, np.full_like(hits, positives))
    fpr = _ratio(guesses - hits, np.full_like(hits, negatives))
    return np.r_[0.0, fpr], np.r_[0.0, tpr], np.r_[np.inf, thresholds]


def precision_recall_curve(truth: Array, score: Array) -> tuple[Floats, Floats, Floats]:
    """Precision, recall and thresholds (score >= threshold), recall rising; recall is NaN without a positive."""
    hits, guesses, thresholds = _sweep(truth, score)
    positives = float(np.asarray(truth).astype(bool).sum())
    return _ratio(hits, guesses), _ratio(hits, np.full_like(hits, positives)), thresholds


def _sweep(truth: Array, score: Array) -> tuple[Floats, Floats, Floats]:
    """True positives and all guesses at each distinct threshold, highest first."""
    order = np.argsort(-np.asarray(score, dtype=np.float64), kind="stable")
    score, truth = np.asarray(score, dtype=np.float64)[order], np.asarray(truth)[order].astype(np.float64)
    last = np.r_[np.flatnonzero(np.diff(score)), score.size - 1]
    return np.cumsum(truth)[last], (last + 1).astype(np.float64), score[last]


# -- all at once


def classification_metrics(labels: Array, probabilities: Array) -> dict[str, float]:
    """What a report says of N cases with one class each.

    Keys: auc (of class 1 where K = 2, else macro one-versus-rest), average_precision (alike), accuracy,
    balanced_accuracy, sensitivity, specificity, f1 (of class 1 where K = 2, else macro), ece, brier, log_loss.
    """
    labels, probabilities = np.asarray(labels, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    classes = probabilities.shape[1]
    truth, predicted = np.eye(classes)[labels], probabilities.argmax(1)
    matrix = confusion_matrix(labels, predicted, classes)
    shown = slice(1, 2) if classes == 2 else slice(None)
    sensitivity, specificity = sensitivity_specificity(matrix)
    f1 = _ratio(2.0 * np.diag(matrix), (matrix.sum(0) + matrix.sum(1)).astype(np.float64))
    return {
        "auc": macro(binary_auc, truth[:, shown], probabilities[:, shown]),
        "average_precision": macro(average_precision, truth[:, shown], probabilities[:, shown]),
        "accuracy": accuracy(labels, predicted),
        "balanced_accuracy": balanced_accuracy(matrix),
        "sensitivity": _mean(sensitivity[shown]),
        "specificity": _mean(specificity[shown]),
        "f1": _mean(f1[shown]),
        "ece": ece(probabilities.max(1), predicted == labels),
        "brier": brier(truth, probabilities),
        "log_loss": log_loss(truth, probabilities),
    }


def multilabel_metrics(truth: Array, probabilities: Array, thresholds: Array | float = 0.5) -> dict[str, float]:
    """What a report says of N cases with K independent labels; keys as :func:`classification_metrics`, macro over
    labels.

    accuracy is over all (case, label) pairs; brier and log_loss are means over labels of the binary ones.
    """
    truth, probabilities = np.asarray(truth).astype(np.int64), np.asarray(probabilities, dtype=np.float64)
    predicted = (probabilities >= thresholds).astype(np.int64)
    hit = (truth * predicted).sum(0).astype(np.float64)
    correct_no = ((1 - truth) * (1 - predicted)).sum(0).astype(np.float64)
    there, guessed, count = truth.sum(0).astype(np.float64), predicted.sum(0).astype(np.float64), float(len(truth))
    sensitivity, specificity = _ratio(hit, there), _ratio(correct_no, count - there)
    both = np.stack([truth, 1 - truth], -1).reshape(-1, 2)
    p_both = np.stack([probabilities, 1 - probabilities], -1).reshape(-1, 2)
    return {
        "auc": macro(binary_auc, truth, probabilities),
        "average_precision": macro(average_precision, truth, probabilities),
        "accuracy": accuracy(truth, predicted),
        "balanced_accuracy": _mean((sensitivity + specificity) / 2),
        "sensitivity": _mean(sensitivity),
        "specificity": _mean(specificity),
        "f1": _mean(_ratio(2 * hit, there + guessed)),
        "ece": ece(probabilities, truth),
        "brier": brier(both, p_both),
        "log_loss": log_loss(both, p_both),
    }


def _ratio(above: Array, below: Array) -> Floats:
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _mean(values: Array) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))
