"""DICOM: one file, or a directory with one series.

A file of one frame is a 2-D image (C, rows, columns). A series, or an enhanced multi-frame file, is a volume in RAS+,
its slices ordered by position along their common normal, never by name or number; positions that repeat equally often
(time points, echoes, b-values) become channels in the order of InstanceNumber. See :mod:`.dicom_grid` for geometry and
:mod:`.dicom_pixels` for values.

Of a directory, files that aren't DICOM, objects that aren't images (SEG, SR, PDF, presentation states, RT) and, beside
other series, scouts are passed over; if more than one series is left, the error names each, and
``directory#SeriesInstanceUID`` picks one.

``Image.original``: ``format`` "dicom"; ``path``; ``files``, the instances in the order of the file grid's slices, and
``frames``, the frame (from 0) in each; ``affine`` (4, 4) to RAS mm and ``shape`` of the grid (columns, rows, slices)
before it was turned, ``affine`` None without geometry; ``orientation``, its axis codes; ``series``, its UID; ``tilt``,
the gantry's in degrees; ``nonfinite``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes

from medray.data.image import Image, Mask
from medray.data.readers.dicom_file import find_frames, load, looks_bare, modality, not_an_image
from medray.data.readers.dicom_grid import Frame, Grid, stack
from medray.data.readers.dicom_pixels import decode
from medray.data.readers.dicom_seg import CLASSES, read_segmentation
from medray.data.readers.guard import finite, reading, require_shape, require_spacing, to_labels
from medray.data.readers.header import Header
from medray.errors import UnreadableError

__all__ = ["looks_bare", "probe", "read_image", "read_mask"]

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


def read_image(path: Path, series: str = "") -> Image:
    """Read a file or a series directory; see the module's own text.

    Args:
        path: of a file or a directory.
        series: SeriesInstanceUID, to pick one of several in a directory.

    Raises:
        UnreadableError: damaged or truncated files, objects that aren't images, several series, slices that are
            missing, repeated unevenly, irregular or not parallel, or no decoder for the transfer syntax.
        MissingDependencyError: pydicom is not installed.
    """
    with reading(path, "DICOM data"):
        grid, header = _survey(path, series)
        stored = _pixels(path, grid)
        array, nonfinite = finite(path, np.ascontiguousarray(_turn(stored, grid)))
        shape, spacing, affine = _turned(path, grid)
        firsts = [places[0] for places in grid.frames]
        original = {
            "format": "dicom",
            "path": str(path),
            "files": [str(frame.path) for frame in firsts],
            "frames": [frame.index for frame in firsts],
            "affine": grid.affine,
            "shape": grid.shape,
            "orientation": None if grid.affine is None else "".join(nib.aff2axcodes(grid.affine)),
            "series": str(header.get("SeriesInstanceUID") or ""),
            "tilt": grid.tilt,
            "nonfinite": nonfinite,
        }
        assert array.shape[1:] == shape
        return Image(
            array=array, spacing=spacing, affine=affine, modality=modality(header), source=str(path), original=original
        )


def read_mask(path: Path, series: str = "") -> Mask:
    """Read a label map: a DICOM Segmentation object (or a directory with one), or images of whole numbers.

    Raises:
        UnreadableError: as :func:`read_image`; fractional or overlapping segments; channels or fractions.
    """
    with reading(path, "DICOM data"):
        objects = [path] if not path.is_dir() else [file for file in sorted(path.iterdir()) if _is_dicom(file)]
        headers = {file: load(file, pixels=False) for file in objects} if not series else {}
        found = [file for file, header in headers.items() if str(header.get("SOPClassUID")) in CLASSES]
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:8])
            raise UnreadableError(path, f"{len(found)} segmentations ({names}); name the file of one")
        if found:
            with reading(found[0], "DICOM segmentation"):
                return read_segmentation(found[0], load(found[0], pixels=True))
    image = read_image(path, series)
    if len(image.array) != 1:
        raise UnreadableError(path, f"a mask has one channel, but this one has {len(image.array)}")
    return Mask(array=to_labels(path, image.array[0]), spacing=image.spacing, affine=image.affine, source=str(path))


def probe(path: Path, series: str = "") -> Header:
    """Shape, channels, spacing and modality from headers alone.

    Raises:
        UnreadableError: as :func:`read_image`, as far as headers tell.
    """
    with reading(path, "DICOM headers"):
        grid, header = _survey(path, series)
        shape, spacing, _ = _turned(path, grid)
        return Header(
            shape=shape, channels=_samples(header) * len(grid.frames[0]), spacing=spacing, modality=modality(header)
        )


def _samples(header: Any) -> int:
    palette = header.get("PhotometricInterpretation") == "PALETTE COLOR"
    return 3 if palette else int(header.get("SamplesPerPixel") or 1)


def _survey(path: Path, series: str) -> tuple[Grid, Any]:
    """The grid of a file's or a series' frames, and one header of it."""
    if not path.is_dir():
        header = load(path, pixels=False)
        frames = find_frames(path, header)
    else:
        chosen = _choose(path, series, _series_in(path))
        header = chosen[0][1]
        frames = [frame for file, one in chosen for frame in find_frames(file, one)]
    grid = stack(path, frames)
    shape = grid.shape[:2] if grid.flat else grid.shape
    require_shape(path, shape, _samples(header) * len(grid.frames[0]))
    return grid, header


def _series_in(directory: Path) -> dict[str, list[tuple[Path, Any]]]:
    """Headers of the image objects that lie directly in a directory, by SeriesInstanceUID.

    Raises:
        UnreadableError: a file that says it is DICOM is damaged; or there is no image object.
    """
    found: dict[str, list[tuple[Path, Any]]] = {}
    others: list[str] = []
    folders = 0
    with reading(directory, "directory"):
        entries = sorted(directory.iterdir())
    for file in entries:
        if file.is_dir():
            folders += 1
            continue
        if file.name.startswith(".") or not _is_dicom(file):
            continue
        header = load(file, pixels=False)
        reason = not_an_image(header)
        if reason is None:
            found.setdefault(str(header.get("SeriesInstanceUID") or "without UID"), []).append((file, header))
        else:
            others.append(f"{file.name} is {reason}")
    if not found:
        inside = f"; {others[0]}" if others else f"; it has {folders} folders: name one of them" if folders else ""
        raise UnreadableError(directory, f"no DICOM image lies directly in this directory{inside}")
    return found


def _is_dicom(file: Path) -> bool:
    """By content; a file that is named as DICOM counts in any case, so that damage shows."""
    if file.name.lower().endswith(_DICOM_SUFFIXES):
        return True
    if not file.is_file():
        return False
    with reading(file), file.open("rb") as stream:
        head = stream.read(144)
    return head[128:132] == b"DICM" or (looks_bare(head) and not file.suffix)


def _choose(path: Path, series: str, found: dict[str, list[tuple[Path, Any]]]) -> list[tuple[Path, Any]]:
    if series:
        if series not in found:
            raise UnreadableError(path, f"no series {series}; it holds {', '.join(found)}")
        return found[series]
    wanted = {uid: files for uid, files in found.items() if not _is_scout(files[0][1])} or found
    if len(wanted) > 1:
        names = "; ".join(
            f"{uid} ({files[0][1].get('Modality', '?')}, {files[0][1].get('SeriesDescription') or 'no description'}, "
            f"{len(files)} files)"
            for uid, files in list(wanted.items())[:8]
        )
        more = "" if len(wanted) <= 8 else f"; and {len(wanted) - 8} more"
        raise UnreadableError(
            path, f"{len(wanted)} series: {names}{more}. Give each a directory of its own, or name one: DIRECTORY#UID"
        )
    return next(iter(wanted.values()))


def _is_scout(header: Any) -> bool:
    kinds = header.get("ImageType") or ()
    return any(kind in ("LOCALIZER", "SCOUT") for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _pixels(path: Path, grid: Grid) -> npt.NDArray[np.float32]:
    """(C, columns, rows, slices), a view of slices that lie in memory one by one; repeats are the slower channel."""
    columns, rows, depth = grid.shape
    places: dict[Path, list[tuple[int, int, Frame]]] = {}
    for k, repeats in enumerate(grid.frames):
        for repeat, frame in enumerate(repeats):
            places.setdefault(frame.path, []).append((k, repeat, frame))
    array: npt.NDArray[np.float32] | None = None
    for file, wanted in places.items():
        values = decode(file, load(file, pixels=True))
        if array is None:
            samples = values.shape[3]
            require_shape(path, (columns, rows, depth), samples * len(grid.frames[0]))
            array = np.empty((len(grid.frames[0]), samples, depth, rows, columns), dtype=np.float32)
        if values.shape[1:] != (rows, columns, array.shape[1]):
            raise UnreadableError(path, f"{file.name} has frames of another size or number of channels than the others")
        for k, repeat, frame in wanted:
            array[repeat, :, k] = values[frame.index].transpose(2, 0, 1)
    assert array is not None
    return array.reshape(-1, depth, rows, columns).transpose(0, 3, 2, 1)


def _turn(stored: npt.NDArray[np.float32], grid: Grid) -> npt.NDArray[np.float32]:
    if grid.flat:
        return stored[..., 0].transpose(0, 2, 1)
    turned = nib.apply_orientation(stored.transpose(1, 2, 3, 0), nib.io_orientation(grid.affine))
    return turned.transpose(3, 0, 1, 2)


def _turned(path: Path, grid: Grid) -> tuple[tuple[int, ...], tuple[float, ...] | None, npt.NDArray[np.float64] | None]:
    """Spatial shape, spacing and affine after :func:`_turn`."""
    shape: tuple[int, ...] = grid.shape[1::-1]
    spacing, affine = grid.spacing, grid.affine
    if affine is not None and grid.flat:
        affine = affine[:, [1, 0, 2, 3]]
    elif affine is not None:
        turn = nib.io_orientation(affine)
        shape = tuple(grid.shape[int(axis)] for axis in np.argsort(turn[:, 0]))
        affine = affine @ nib.orientations.inv_ornt_aff(turn, grid.shape)
        spacing = tuple(float(v) for v in voxel_sizes(affine))
    if spacing is not None:
        require_spacing(path, spacing, shape)
    return shape, spacing, affine
