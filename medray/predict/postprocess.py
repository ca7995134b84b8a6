"""From probabilities to answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def keep_largest(labels: npt.NDArray[np.integer[Any]], num_classes: int) -> npt.NDArray[np.integer[Any]]:
    """Keep the largest connected component (faces touching) of each foreground class; the rest becomes background.

    Args:
        labels: (*s).
        num_classes: K, background (0) counted.

    Returns:
        (*s) of the same type.
    """
    from scipy import ndimage

    result = labels.copy()
    for value in range(1, num_classes):
        parts, count = ndimage.label(labels == value)
        if count > 1:
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0
            result[(parts > 0) & (parts != sizes.argmax())] = 0
    return result


def fit_thresholds(probabilities: npt.NDArray[Any], targets: npt.NDArray[Any]) -> tuple[float, ...]:
    """Per label, the threshold with the largest Youden index (sensitivity + specificity - 1) on validation cases.

    Args:
        probabilities: (N, K) calibrated.
        targets: (N, K) zeros and ones; 255 is ignored.

    Returns:
        K thresholds, halfway between the two neighbouring scores; 0.5 for a label that shows only one side.
    """
    chosen = []
    for score, truth in zip(probabilities.T, targets.T, strict=True):
        known = truth != 255
        order = np.argsort(score[known], kind="stable")
        values, positive = score[known][order], truth[known][order].astype(bool)
        total, negatives = int(positive.sum()), int((~positive).sum())
        if not total or not negatives:
            chosen.append(0.5)
            continue
        # cutting below element i: everything from i on is called positive
        sensitivity = 1 - np.concatenate([[0], np.cumsum(positive)]) / total
        specificity = np.concatenate([[0], np.cumsum(~positive)]) / negatives
        youden = sensitivity + specificity - 1
        cuttable = np.concatenate([[True], np.diff(values) > 0, [True]])
        index = int(np.where(cuttable, youden, -np.inf).argmax())
        edges = np.concatenate([[0.0], values, [1.0]])
        chosen.append(float((edges[index] + edges[index + 1]) / 2))
    return tuple(chosen)
