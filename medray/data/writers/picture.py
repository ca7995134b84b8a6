"""Label maps and overlays as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import PngImagePlugin

from medray.data.image import Image
from medray.data.writers.atomic import appearing
from medray.errors import DataError

# Okabe and Ito's colours, told apart with any colour vision; class 0 is background.
PALETTE = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def colour(label: int) -> tuple[int, int, int]:
    """RGB of a class; classes beyond the seventh repeat the colours."""
    return PALETTE[0] if label == 0 else PALETTE[1 + (label - 1) % (len(PALETTE) - 1)]


def write_labels(path: Path, labels: npt.NDArray[np.integer[Any]], *, note: str = "") -> None:
    """Write ``labels`` (H, W), at most 255, as a PNG with a palette: the stored number is the class.

    The picture is upright as the reader's is, with the EXIF orientation of a photograph already carried out.
    """
    if labels.ndim != 2 or int(labels.max(initial=0)) > 255:
        raise DataError(f"{path}: labels of shape {labels.shape} up to {labels.max()} do not fit a PNG; write NIfTI")
    picture = Pillow.fromarray(labels.astype(np.uint8))
    picture.putpalette([value for label in range(256) for value in colour(label)])
    _save(picture, path, note)


def write_overlay(path: Path, image: Image, labels: npt.NDArray[np.integer[Any]], *, note: str = "") -> None:
    """Write a picture (H, W) with its labels outlined and tinted."""
    _save(Pillow.fromarray(overlay(image.array, labels)), path, note)


def overlay(
    array: npt.NDArray[np.float32], labels: npt.NDArray[np.integer[Any]], *, opacity: float = 0.35
) -> npt.NDArray[np.uint8]:
    """Tint (C, H, W), shown between its 1st and 99th percentile, with the colours of labels (H, W): (H, W, 3) uint8.

    Outlines are drawn at full colour, so that what lies under a label can be judged.
    """
    if array.shape[1:] != labels.shape:
        raise DataError(f"labels of shape {labels.shape} for a picture of {array.shape[1:]}; they must be alike")
    shown = array if len(array) == 3 else np.repeat(array[:1], 3, axis=0)
    low, high = np.percentile(shown, [1, 99])
    base = np.clip((shown - low) / max(float(high - low), 1e-6), 0, 1).transpose(1, 2, 0) * 255
    table = np.array([colour(label) for label in range(256)], dtype=np.float32)
    tint = table[np.minimum(labels, 255)]
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        change = np.diff(labels, axis=axis) != 0
        before = [slice(None), slice(None)]
        after = [slice(None), slice(None)]
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edge[tuple(before)] |= change
        edge[tuple(after)] |= change
    weight = np.where(edge, 1.0, opacity)[..., None] * (labels > 0)[..., None]
    return np.rint(base * (1 - weight) + tint * weight).astype(np.uint8)


def write_heat(path: Path, image: Image, heat: npt.NDArray[np.float32], *, note: str = "") -> None:
    """Write a picture with a heat map (*s), 0 to 1, laid over it; of a volume the three slices through its hottest
    voxel, side by side, each with its axes in proportion."""
    if heat.shape != image.shape:
        raise DataError(f"{path}: heat of shape {heat.shape} for an image of {image.shape}; they must be alike")
    if image.ndim == 2:
        return _save(Pillow.fromarray(heat_overlay(image.array, heat)), path, note)
    hottest = np.unravel_index(int(heat.argmax()), heat.shape)
    spacing = image.spacing or (1.0, 1.0, 1.0)
    tiles = []
    for axis in (2, 1, 0):
        drawn = heat_overlay(np.take(image.array, hottest[axis], axis + 1), np.take(heat, hottest[axis], axis))
        across, up = (a for a in range(3) if a != axis)
        tile = Pillow.fromarray(np.ascontiguousarray(np.rot90(drawn)))  # superior or anterior upwards
        size = (round(heat.shape[across] * spacing[across]), round(heat.shape[up] * spacing[up]))
        scale = 256 / max(1, size[1])
        tiles.append(tile.resize((max(1, round(size[0] * scale)), 256), Pillow.Resampling.BILINEAR))
    canvas = Pillow.new("RGB", (sum(tile.width for tile in tiles), 256))
    left = 0
    for tile in tiles:
        canvas.paste(tile, (left, 0))
        left += tile.width
    _save(canvas, path, note)


def heat_overlay(
    array: npt.NDArray[np.float32], heat: npt.NDArray[np.float32], *, opacity: float = 0.5
) -> npt.NDArray[np.uint8]:
    """Lay heat (H, W), 0 to 1, over (C, H, W): (H, W, 3) uint8. From black over red and orange to white, and the
    stronger the hotter, so that what is cold shows the picture alone."""
    shown = array if len(array) == 3 else np.repeat(array[:1], 3, axis=0)
    low, high = np.percentile(shown, [1, 99])
    base = np.clip((shown - low) / max(float(high - low), 1e-6), 0, 1).transpose(1, 2, 0) * 255
    warm = np.clip(heat, 0, 1)[..., None]
    tint = np.clip(warm * np.array([3.0, 3.0, 3.0]) - np.array([0.0, 1.0, 2.0]), 0, 1) * 255
    weight = opacity * np.sqrt(warm)
    return np.rint(base * (1 - weight) + tint * weight).astype(np.uint8)


def _save(picture: Pillow.Image, path: Path, note: str) -> None:
    text = PngImagePlugin.PngInfo()
    if note:
        text.add_itxt("Description", note)
    with appearing(path) as partial:
        picture.save(partial, format="PNG", pnginfo=text, optimize=False)
