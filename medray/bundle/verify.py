"""Do two runtimes agree? The parity rule, and the golden check that stands before every use.

fp32: the largest difference of logits is at most 1e-3. bf16, fp16: at least 99.5 % of the answers are alike (labels for
classification, the foreground's Dice for segmentation) and probabilities within 0.02 (all of them for classification;
99.9 % of the voxels for segmentation, since single voxels on a boundary prove nothing about an engine).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medray.errors import BundleError
from medray.predict.predictor import Floats, Predictor, probabilities
from medray.tasks.catalogue import find_task

LOGITS = 1e-3
ALIKE = 0.995
PROBABILITY = 0.02


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far one runtime's answers lie from the golden ones.

    Attributes:
        runtime: name and precision.
        logits: largest absolute difference of logits.
        alike: share of equal labels, or the foreground's Dice.
        probability: difference of probabilities (largest, or its 99.9th percentile for segmentation).
        met: whether the rule for this precision holds.
    """

    runtime: str
    logits: float
    alike: float
    probability: float
    met: bool


def compare(
    runtime: str, precision: str, logits: Floats, golden: Floats, kind: str, temperature: float = 1.0
) -> Parity:
    """Measure logits (N, O[, *s]) against golden ones by the rule of ``precision``.

    Answers and probabilities are those of logits over ``temperature``, as the bundle gives them.
    """
    if logits.shape != golden.shape:
        raise BundleError(f"{runtime} gives logits of shape {logits.shape}; the golden ones have {golden.shape}")
    if not np.isfinite(logits).all():
        return Parity(runtime=f"{runtime} {precision}", logits=float("inf"), alike=0.0, probability=1.0, met=False)
    difference = float(np.abs(logits - golden).max(initial=0.0))
    ours, theirs = probabilities(logits, kind, temperature), probabilities(golden, kind, temperature)
    gap = np.abs(ours - theirs)
    task = find_task(kind)
    if task.dense:
        mine, other = ours.argmax(axis=1), theirs.argmax(axis=1)
        size = int((mine > 0).sum() + (other > 0).sum())
        alike = 2.0 * int(((mine == other) & (mine > 0)).sum()) / size if size else 1.0
        probability = float(np.quantile(gap.max(axis=1), 0.999))
    else:
        same = task.decide(ours) == task.decide(theirs)
        alike, probability = float(same.mean()), float(gap.max(initial=0.0))
    met = difference <= LOGITS if precision == "fp32" else alike >= ALIKE and probability <= PROBABILITY
    return Parity(runtime=f"{runtime} {precision}", logits=difference, alike=alike, probability=probability, met=met)


def check_golden(predictor: Predictor, inputs: Floats, golden: Floats, kind: str, temperature: float = 1.0) -> Parity:
    """Run golden inputs (N, C, *s), one at a time and as a batch, and hold the logits against the golden ones.

    ``temperature`` is the bundle's, see :func:`compare`.

    Raises:
        BundleError: the rule for the predictor's precision does not hold.
    """
    singles = np.concatenate([predictor(inputs[index : index + 1]) for index in range(len(inputs))])
    found = [compare(predictor.name, predictor.precision, singles, golden, kind, temperature)]
    if len(inputs) > 1:
        found.append(compare(predictor.name, predictor.precision, predictor(inputs), golden, kind, temperature))
    worst = max(found, key=lambda parity: (not parity.met, parity.logits))
    if not worst.met:
        rule = (
            f"logits within {LOGITS:g}"
            if predictor.precision == "fp32"
            else f"{ALIKE:.1%} alike, probabilities within {PROBABILITY:g}"
        )
        raise BundleError(
            f"the {worst.runtime} runtime does not reproduce the golden outputs: logits differ by {worst.logits:.2g}, "
            f"{worst.alike:.2%} alike, probabilities differ by {worst.probability:.2g}; the rule is {rule}. "
            "Do not use it here: take another runtime or precision, or write the bundle anew"
        )
    return worst
