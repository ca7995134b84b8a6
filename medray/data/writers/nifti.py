"""Label maps as NIfTI, on the very voxel grid of the input file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from medray.data.image import Image
from medray.data.writers.atomic import appearing
from medray.errors import DataError


def write_labels(path: Path, labels: npt.NDArray[np.integer[Any]], image: Image, *, note: str = "") -> None:
    """Write ``labels`` so that it lies voxel on voxel on the file that ``image`` was read from.

    Args:
        path: ending in .nii.gz or .nii.
        labels: (*s) on the grid of ``image.array``.
        image: as the reader gave it. Without ``original`` (a phantom) its own RAS grid is written.
        note: into the header's description (at most 79 bytes).

    Raises:
        DataError: labels of another shape than the image.
    """
    if labels.shape != image.shape:
        raise DataError(f"{path}: labels of shape {labels.shape} for an image of {image.shape}; they must be alike")
    affine, turned = to_original(labels, image)
    largest = int(turned.max(initial=0))
    _save(path, affine, turned.astype(np.uint8 if largest < 256 else np.int16 if largest < 2**15 else np.int32), note)


def write_map(path: Path, values: npt.NDArray[np.floating[Any]], image: Image, *, note: str = "") -> None:
    """Write ``values`` (*s) as float32, voxel on voxel on the file that ``image`` was read from; else as labels are.

    Raises:
        DataError: values of another shape than the image.
    """
    if values.shape != image.shape:
        raise DataError(f"{path}: values of shape {values.shape} for an image of {image.shape}; they must be alike")
    affine, turned = to_original(values, image)
    _save(path, affine, turned.astype(np.float32), note)


def _save(path: Path, affine: npt.NDArray[np.float64], stored: npt.NDArray[Any], note: str) -> None:
    nifti = nib.Nifti1Image(np.ascontiguousarray(stored), affine)
    nifti.header.set_xyzt_units("mm")
    # Both transforms with code 1 (scanner coordinates), so that programs that trust only one of them agree; a sheared
    # grid has no qform.
    nifti.set_sform(affine, code=1)
    try:
        nifti.set_qform(affine, code=1, strip_shears=False)
    except HeaderDataError:
        nifti.set_qform(None, code=0)
    nifti.header["descrip"] = note.encode("utf-8")[:79]
    with appearing(path) as partial:
        nib.save(nifti, partial)


def to_original(array: npt.NDArray[Any], image: Image) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """``array`` (*s) from the grid of ``image.array`` back to the file's: its affine (4, 4), three axes (I, J, K)."""
    known = image.original.get("format") == "nifti"
    if image.ndim == 2:
        # a reader turns a single slice (columns, rows, 1) to (rows, columns) and nothing more
        flat = np.swapaxes(array, 0, 1)[..., None]
        if known:
            return np.asarray(image.original["affine"], dtype=np.float64), flat
        if image.affine is not None:
            return np.asarray(image.affine, dtype=np.float64)[:, [1, 0, 2, 3]], flat
        rows, columns = image.spacing or (1.0, 1.0)
        return np.diag([columns, rows, 1.0, 1.0]), flat
    if not known:
        own = image.affine if image.affine is not None else np.diag([*(image.spacing or (1.0, 1.0, 1.0)), 1.0])
        return np.asarray(own, dtype=np.float64), array
    original = np.asarray(image.original["affine"], dtype=np.float64)
    to_ras = nib.io_orientation(original)
    back = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), to_ras)
    turned = nib.apply_orientation(array, back)
    if turned.shape != tuple(image.original["shape"]):
        raise DataError(
            f"{image.source}: labels turn to shape {turned.shape}, but the file has {image.original['shape']}"
        )
    return original, turned
