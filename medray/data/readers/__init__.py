"""Readers: a reference to an :class:`~medray.data.image.Image`, :class:`~medray.data.image.Mask` or :class:`Header`.

A reference is a path relative to ``root`` (or absolute) of a picture, NIfTI or DICOM file; a directory with one DICOM
series, or ``directory#SeriesInstanceUID`` where there are several; ``file.npz#array/index``; ``table.csv#row;columns``
(see :mod:`medray.data.rows`); or ``phantom://…``. The
format is told by content, not by suffix. Whatever is wrong with a file is an :class:`~medray.errors.UnreadableError`
that names it and the cause; sizes that a header claims are checked before anything is allocated.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from medray.data.image import Image, Mask
from medray.data.manifest import Case
from medray.data.readers import dicom, nifti, npz, picture, row
from medray.data.readers.dicom_seg import place
from medray.data.readers.guard import reading, require_file
from medray.data.readers.header import Header
from medray.data.rows import is_row
from medray.errors import UnreadableError

__all__ = ["Header", "probe", "read_case", "read_image", "read_mask"]

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"GIF87a", b"GIF89a")
_SUFFIXES = {
    nifti: (".nii", ".nii.gz", ".hdr", ".img"),
    picture: (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif"),
    dicom: (".dcm", ".dicom", ".ima"),
}


def read_image(reference: str, root: Path) -> Image:
    """Read an image.

    Args:
        reference: see the module's own text.
        root: what relative paths start from.

    Returns:
        (C, H, W) or (C, X, Y, Z) in RAS+, float32, all finite (but a table's gaps), in the file's own units.

    Raises:
        UnreadableError: whatever is wrong with it.
        MissingDependencyError: its format needs a library that isn't installed.
    """
    if reference.startswith("phantom://"):
        from medray.data.phantoms import read_phantom

        return read_phantom(reference)[0]
    path, member = _locate(reference, root)
    if is_row(member):
        return row.read_image(path, member)
    module = _format(path, member)
    if module is npz:
        return npz.read_image(path, member)
    return dicom.read_image(path, series=member) if module is dicom else module.read_image(path)


def read_mask(reference: str, root: Path) -> Mask:
    """Read a label map: whole numbers, never interpolated. A black and white picture (0 and 255) becomes 0 and 1.

    Returns:
        (H, W) or (X, Y, Z) in RAS+, uint8 or int32.

    Raises:
        UnreadableError: whatever is wrong with it; fractions and true colours among it.
        MissingDependencyError: its format needs a library that isn't installed.
    """
    if reference.startswith("phantom://"):
        from medray.data.phantoms import read_phantom

        mask = read_phantom(reference)[1]
        if mask is None:
            raise UnreadableError(reference, "this phantom has no mask; take one made for segmentation")
        return mask
    path, member = _locate(reference, root)
    module = _format(path, member)
    if module is npz:
        return npz.read_mask(path, member)
    return dicom.read_mask(path, series=member) if module is dicom else module.read_mask(path)


def probe(reference: str, root: Path) -> Header:
    """Shape, channels, spacing and modality, from headers alone where the format allows.

    Raises:
        UnreadableError: as :func:`read_image`, as far as headers tell.
    """
    if reference.startswith("phantom://"):
        image = read_image(reference, root)
        return Header(shape=image.shape, channels=len(image.array), spacing=image.spacing, modality=image.modality)
    path, member = _locate(reference, root)
    if is_row(member):
        return row.probe(member)
    module = _format(path, member)
    if module is npz:
        return npz.probe(path, member)
    return dicom.probe(path, series=member) if module is dicom else module.probe(path)


def read_case(case: Case, root: Path) -> tuple[Image, Mask | None, Mask | None]:
    """Read all of a case: its images stacked as channels, its mask, and the mask of its valid region.

    Raises:
        UnreadableError: one can't be read; images of one case differ in geometry; or a mask's shape isn't the image's.
    """
    images = [read_image(reference, root) for reference in case.images]
    image = images[0]
    for other in images[1:]:
        _require_same_grid(image, other)
    if len(images) > 1:
        image = Image(
            array=np.concatenate([one.array for one in images]),
            spacing=image.spacing,
            affine=image.affine,
            modality=image.modality,
            source=image.source,
            original=image.original,
        )
    masks = [
        None if reference is None else _aligned(read_mask(reference, root), image)
        for reference in (case.mask, case.valid)
    ]
    for mask in masks:
        if mask is not None and mask.array.shape != image.shape:
            raise UnreadableError(
                mask.source,
                f"the mask has shape {mask.array.shape}, its image {image.shape} ({image.source}); they share a grid",
            )
    return image, masks[0], masks[1]


def _aligned(mask: Mask, image: Image) -> Mask:
    """A DICOM image's mask in the image's grid: segmentations hold only the slices where something was marked."""
    if image.original.get("format") != "dicom" or mask.affine is None or image.affine is None:
        return mask
    same = mask.array.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-3)
    return mask if same else place(mask, image)


def _require_same_grid(first: Image, other: Image) -> None:
    if first.shape != other.shape:
        raise UnreadableError(
            other.source, f"shape {other.shape} differs from {first.shape} of {first.source}; resample both to one grid"
        )
    if first.affine is None or other.affine is None or first.spacing is None:
        return
    # Compared where it matters: at the far corner a tenth of a voxel is the most that two grids may be apart.
    corner = np.array([*first.shape, *[1] * (4 - len(first.shape))], dtype=np.float64)
    apart = np.abs((first.affine - other.affine)[:3]) @ corner
    if apart.max() > 0.1 * min(first.spacing):
        raise UnreadableError(
            other.source,
            f"its grid lies up to {apart.max():.3g} mm off that of {first.source}; resample both to one grid",
        )


def _locate(reference: str, root: Path) -> tuple[Path, str]:
    """Path and what stands behind '#', which a file's own name may hold too."""
    if "://" in reference:
        raise UnreadableError(reference, "no file; download it first and give its path")
    if not reference or "\0" in reference:
        raise UnreadableError(repr(reference), "an empty path, or one with a NUL character, names no file")
    with reading(reference):
        whole, _, member = reference.rpartition("#")
        if is_row(member):
            return root / whole, member
        path = root / reference
        if "#" in reference and not path.exists():
            whole, _, member = reference.rpartition("#")
            return root / whole, member
        return path, ""


def _format(path: Path, member: str) -> ModuleType:
    """The module that reads ``path``, by content; where that says nothing by suffix, so that its error is precise."""
    with reading(path):
        if path.is_dir():
            return dicom
        require_file(path)
        with path.open("rb") as file:
            head = file.read(352)
    if head[:4] in (b"PK\3\4", b"PK\5\6") or path.suffix.lower() == ".npz":
        return npz
    if member:
        raise UnreadableError(path, f"'#{member}' names an item of an .npz or a series of a directory; this is neither")
    if head[:2] == b"\x1f\x8b" or head[:4] in (b"\x5c\1\0\0", b"\0\0\1\x5c", b"\x1c\2\0\0", b"\0\0\2\x1c"):
        return nifti
    if head[128:132] == b"DICM":  # before pictures: the preamble in front of it may make the file a TIFF as well
        return dicom
    if head.startswith(_PICTURES):
        return picture
    if dicom.looks_bare(head):
        return dicom
    for module, suffixes in _SUFFIXES.items():
        if path.name.lower().endswith(suffixes):
            return module
    raise UnreadableError(path, "no known format; readable are PNG, JPEG, TIFF, BMP, GIF, NIfTI, DICOM and .npz")
