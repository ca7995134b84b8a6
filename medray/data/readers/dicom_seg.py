"""DICOM Segmentation objects (PS3.3 A.51; label maps, Sup. 243) as label maps.

A binary object's segment number is the label; a label map's pixels are. Objects may hold only the frames where
something was marked: the grid runs from the first of them to the last, and a frame that is absent is 0. :func:`place`
puts such a mask into the grid of its image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes

from medray.data.image import Image, Mask
from medray.data.readers.dicom_file import functional, functional_frames
from medray.data.readers.dicom_grid import LPS_TO_RAS, common_plane
from medray.data.readers.dicom_pixels import decode
from medray.data.readers.guard import require_shape, require_spacing, to_labels
from medray.errors import UnreadableError

LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", LABEL_MAP)
_ON_GRID = 0.1  # voxels: largest distance of a frame or a voxel from its place in a grid


def read_segmentation(path: Path, dataset: Any) -> Mask:
    """The label map of a segmentation object with its pixels: (X, Y, Z) in RAS+, or (H, W) where it has one slice.

    Raises:
        UnreadableError: fractional or overlapping segments, frames without positions or off a grid, damaged pixels.
    """
    numbered = str(dataset.SOPClassUID) != LABEL_MAP
    if numbered and dataset.get("SegmentationType") != "BINARY":
        raise UnreadableError(path, f"a {dataset.get('SegmentationType')} segmentation; save it as BINARY or LABELMAP")
    frames = functional_frames(path, dataset)
    row, column, normal = common_plane(path, frames)
    corners = np.array([frame.position for frame in frames])
    depth = corners @ normal
    low, high = int(depth.argmin()), int(depth.argmax())
    steps = np.diff(np.unique(np.round(depth, 3)))
    count, step = 1, normal * (frames[0].thickness or 1.0)
    if steps.size and depth[high] - depth[low] > 0.01:
        count = round(float((depth[high] - depth[low]) / steps.min())) + 1
        step = (corners[high] - corners[low]) / (count - 1)
    places = (depth - depth[low]) / np.linalg.norm(step @ normal)
    if np.abs(places - np.rint(places)).max() > _ON_GRID:
        raise UnreadableError(path, "its frames lie on no even grid; save the segmentation with all slices")
    rows, columns = frames[0].size
    require_shape(path, (columns, rows, count))
    pixels = to_labels(path, decode(path, dataset)[..., 0])
    labels = np.zeros((count, rows, columns), np.uint8 if pixels.max() < 256 and not numbered else np.int32)
    for frame, place, marked in zip(frames, np.rint(places).astype(int), pixels, strict=True):
        if not numbered:
            labels[place] = marked
            continue
        group = dataset.PerFrameFunctionalGroupsSequence[frame.index]
        number = int(functional(dataset, group, "SegmentIdentificationSequence").ReferencedSegmentNumber)
        before = labels[place][marked > 0]
        if ((before != 0) & (before != number)).any():
            raise UnreadableError(path, f"segment {number} overlaps another; a label map has one class a voxel")
        labels[place][marked > 0] = number
    affine = np.eye(4)
    assert frames[0].spacing is not None
    directions = [row * frames[0].spacing[1], column * frames[0].spacing[0], step, corners[low]]
    affine[:3] = np.stack(directions, axis=1)
    return _mask(path, to_labels(path, labels.transpose(2, 1, 0)), LPS_TO_RAS @ affine)


def _mask(path: Path, labels: npt.NDArray[np.integer[Any]], affine: npt.NDArray[np.float64]) -> Mask:
    """(columns, rows, slices) with its affine to the orientation that images have."""
    if labels.shape[2] == 1:
        labels, affine = labels[..., 0].T, affine[:, [1, 0, 2, 3]]
    else:
        turn = nib.io_orientation(affine)
        affine = affine @ nib.orientations.inv_ornt_aff(turn, labels.shape)
        labels = nib.apply_orientation(labels, turn)
    if labels.max(initial=0) < 256:
        labels = labels.astype(np.uint8)
    spacing = tuple(float(v) for v in voxel_sizes(affine)[: labels.ndim])
    require_spacing(path, spacing, labels.shape)
    return Mask(array=np.ascontiguousarray(labels), spacing=spacing, affine=affine, source=str(path))


def place(mask: Mask, image: Image) -> Mask:
    """``mask`` in the grid of ``image``, of which it may cover a part; nothing is interpolated.

    Raises:
        UnreadableError: its voxels aren't the image's, or marked ones lie outside of it.
    """
    assert mask.affine is not None and image.affine is not None
    index = np.argwhere(mask.array)
    values = mask.array[tuple(index.T)]
    pad = 3 - index.shape[1]
    where = np.pad(index, ((0, 0), (0, pad + 1))).astype(np.float64)
    where[:, 3] = 1
    to_image = np.linalg.inv(image.affine) @ mask.affine
    found = (where @ to_image.T)[:, :3]
    nearest = np.rint(found).astype(np.int64)
    extent = np.array([*image.shape, *[1] * (3 - image.ndim)])
    steps = np.linalg.norm(to_image[:3, :3], axis=0)[: mask.array.ndim]
    long = np.array(mask.array.shape) > 1  # how thick a single slice is says nothing
    if np.abs(steps[long] - 1).max(initial=0) > 0.01 or np.abs(found - nearest).max(initial=0) > _ON_GRID:
        raise UnreadableError(mask.source, f"its voxels aren't those of {image.source}; resample it to that grid")
    if ((nearest < 0) | (nearest >= extent)).any():
        raise UnreadableError(mask.source, f"marks voxels outside of {image.source}; is it of another series?")
    labels = np.zeros(tuple(extent), mask.array.dtype)
    labels[tuple(nearest.T)] = values
    return Mask(array=labels.reshape(image.shape), spacing=image.spacing, affine=image.affine, source=mask.source)
