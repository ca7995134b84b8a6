"""From images and label maps to small pictures that a report can show. 3-D becomes its most telling slice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medray.data.image import Image
from medray.data.manifest import IGNORE
from medray.data.writers.picture import overlay

LARGEST = 320
"""Pixels of a picture's longer side: a report with twenty stays under a few megabytes."""


def plane(image: Image, labels: npt.NDArray[Any] | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any] | None]:
    """(C, H, W) and (H, W): the picture itself, or of a volume the axial slice that shows most foreground.

    Volumes are RAS: rows run from anterior down, columns from the patient's right, as radiologists look.
    """
    if image.ndim == 2:
        return image.array, labels
    where = image.shape[2] // 2
    if labels is not None and ((labels > 0) & (labels != IGNORE)).any():
        where = int(((labels > 0) & (labels != IGNORE)).sum(axis=(0, 1)).argmax())
    array = np.flip(image.array[:, :, :, where].transpose(0, 2, 1), axis=(1, 2))
    flat = None if labels is None else np.flip(labels[:, :, where].T, axis=(0, 1))
    return np.ascontiguousarray(array), None if flat is None else np.ascontiguousarray(flat)


def show(image: Image, labels: npt.NDArray[Any] | None = None) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image, its labels tinted."""
    array, flat = plane(image, labels)
    flat = np.zeros(array.shape[1:], np.uint8) if flat is None else np.where(flat == IGNORE, 0, flat).astype(np.uint8)
    return _fit(overlay(array, flat))


def beside(image: Image, truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """(H, 2 W + gap, 3) uint8: the same slice with the reference at the left and the prediction at the right."""
    array, reference = plane(image, truth)
    if image.ndim == 2:
        answer = predicted
    else:
        where = image.shape[2] // 2
        known = (truth > 0) & (truth != IGNORE)
        if known.any():
            where = int(known.sum(axis=(0, 1)).argmax())
        answer = np.ascontiguousarray(np.flip(predicted[:, :, where].T, axis=(0, 1)))
    assert reference is not None
    left = _fit(overlay(array, np.where(reference == IGNORE, 0, reference).astype(np.uint8)))
    right = _fit(overlay(array, answer.astype(np.uint8)))
    gap = np.full((left.shape[0], 6, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _fit(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Enlarge tiny pictures by a whole factor, thin out large ones."""
    side = max(pixels.shape[:2])
    if side <= LARGEST // 2:
        factor = LARGEST // 2 // side + 1
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    step = -(-side // LARGEST)
    return np.ascontiguousarray(pixels[::step, ::step])
