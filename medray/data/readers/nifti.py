"""NIfTI-1 and -2 in one file (.nii, .nii.gz).

Volumes are turned to RAS+ by permuting and flipping axes, as nibabel's ``as_closest_canonical`` does; nothing is
resampled, so oblique scans keep their oblique affine. A fourth axis (or a fifth, of vectors) becomes channels. A file
with two axes, or a single slice along the third, is a 2-D image whose rows run along the file's second axis and columns
along its first, unturned.

``Image.original``: ``format`` "nifti"; ``path``; ``affine`` (4, 4) of the file's own voxel grid, in mm; ``shape``, its
three axes; ``orientation``, axis codes such as "LPS"; ``dtype`` on disk; ``nonfinite``, how many voxels were none.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes

from medray.data.image import Image, Mask
from medray.data.readers.guard import (
    finite,
    reading,
    require_file,
    require_ratio,
    require_shape,
    require_spacing,
    to_labels,
)
from medray.data.readers.header import Header
from medray.errors import UnreadableError

_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MAX_OFFSET = 2**26  # header extensions hold a DICOM header or an XML; 64 MiB of them is no image
_SLACK = 2**20  # bytes that some writers leave behind the data
_TO_MM = {"meter": 1000.0, "micron": 1e-3}


@dataclass(frozen=True)
class _Layout:
    """A header, understood. ``shape`` has always three axes, in the file's order; ``records`` is the rest of them."""

    dtype: np.dtype[Any]
    shape: tuple[int, int, int]
    records: int
    offset: int
    scale: tuple[float, float] | None
    affine: npt.NDArray[np.float64]
    compressed: bool

    @property
    def flat(self) -> bool:
        return self.shape[2] == 1

    @property
    def channels(self) -> int:
        return self.records * (1 if self.dtype.names is None else 3)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.records * self.dtype.itemsize

    @property
    def turn(self) -> npt.NDArray[np.float64]:
        """nibabel's orientation array, (3, 2): file axes to RAS."""
        return cast("npt.NDArray[np.float64]", nib.io_orientation(self.affine))


def read_image(path: Path) -> Image:
    """Read a NIfTI file: (C, X, Y, Z) in RAS+, or (C, H, W); see the module's own text.

    Raises:
        UnreadableError: it is damaged, truncated, too large, complex-valued, or no NIfTI file.
    """
    with reading(path, "NIfTI file"):
        layout, values = _load(path, labels=False)
        shape, affine = _turned(layout)
        array = np.ascontiguousarray(_turn(values, layout), dtype=np.float32)
        if layout.scale is not None:
            array *= np.float32(layout.scale[0])
            array += np.float32(layout.scale[1])
        array, nonfinite = finite(path, array)
        original = {
            "format": "nifti",
            "path": str(path),
            "affine": layout.affine,
            "shape": layout.shape,
            "orientation": "".join(nib.aff2axcodes(layout.affine)),
            "dtype": layout.dtype.name,
            "nonfinite": nonfinite,
        }
        spacing = _spacing(affine, len(shape))
        return Image(array=array, spacing=spacing, affine=affine, source=str(path), original=original)


def read_mask(path: Path) -> Mask:
    """Read a label map, (X, Y, Z) in RAS+ or (H, W).

    Raises:
        UnreadableError: as :func:`read_image`; or it has channels, fractions or NaN.
    """
    with reading(path, "NIfTI file"):
        layout, values = _load(path, labels=True)
        if layout.channels != 1:
            raise UnreadableError(path, f"a mask has one channel, this one has {layout.channels}; save one label map")
        shape, affine = _turned(layout)
        turned = _turn(values, layout)
        if layout.scale is not None:
            turned = turned * layout.scale[0] + layout.scale[1]
        array = np.ascontiguousarray(to_labels(path, turned[0]))
        return Mask(array=array, spacing=_spacing(affine, len(shape)), affine=affine, source=str(path))


def probe(path: Path) -> Header:
    """Shape, channels and spacing from the header alone.

    Raises:
        UnreadableError: as :func:`read_image`, as far as the header tells.
    """
    with reading(path, "NIfTI header"):
        size = require_file(path)
        with _open(path) as stream:
            layout = _parse(path, stream, size, labels=True)
        shape, affine = _turned(layout)
        return Header(shape=shape, channels=layout.channels, spacing=_spacing(affine, len(shape)))


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def _parse(path: Path, stream: BinaryIO, size: int, *, labels: bool) -> _Layout:
    """The header as a layout that the file's size can hold; leaves ``stream`` at the first voxel."""
    block = stream.read(348)
    length = next((n for n in _HEADERS if block[:4] in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), None)
    if length is None:
        raise UnreadableError(path, "no NIfTI file: its header has neither 348 nor 540 bytes")
    block += stream.read(length - 348)
    if len(block) < length:
        raise UnreadableError(path, f"truncated inside the NIfTI header ({len(block)} of {length} bytes)")
    header = _HEADERS[length](block[:length], check=False)
    if header["magic"].item()[:3] != (b"n+1" if length == 348 else b"n+2"):
        raise UnreadableError(path, "not a single-file NIfTI (Analyze, or a .hdr/.img pair): convert it to .nii.gz")
    rank, *lengths = (int(n) for n in header["dim"])
    if not 1 <= rank <= 7 or any(n < 1 for n in lengths[:rank]):
        raise UnreadableError(path, f"the header claims {rank} axes of lengths {lengths}; 1 to 7 of at least 1 can be")
    x, y, z, *_ = (*lengths[: min(rank, 3)], 1, 1)
    rest = lengths[3:rank]
    if sum(n > 1 for n in rest) > 1:
        raise UnreadableError(path, f"axes {lengths[:rank]}: two axes besides space; split the file along one of them")
    layout = _Layout(
        dtype=header.get_data_dtype(),
        shape=(x, y, z),
        records=math.prod(rest),
        offset=int(header["vox_offset"]),
        scale=_scale(path, header),
        affine=_affine(path, header),
        compressed=isinstance(stream, gzip.GzipFile),
    )
    if layout.dtype.names is None and layout.dtype.kind not in "iufb":
        raise UnreadableError(path, f"voxels of type {layout.dtype}: save their magnitude or phase instead")
    require_shape(path, layout.shape[:2] if layout.flat else layout.shape, layout.channels)
    require_spacing(path, voxel_sizes(layout.affine), layout.shape)
    if not length <= layout.offset <= _MAX_OFFSET:
        raise UnreadableError(path, f"the header says that voxels start at byte {layout.offset}, which can't be")
    if layout.compressed:
        require_ratio(path, layout.nbytes, size, labels=labels)
    elif layout.offset + layout.nbytes > size:
        raise UnreadableError(
            path, f"truncated: the header claims {layout.offset + layout.nbytes:,} bytes, the file has {size:,}"
        )
    stream.read(layout.offset - length)
    return layout


def _scale(path: Path, header: Any) -> tuple[float, float] | None:
    """(slope, intercept); None where stored values are meant. A slope of 0 (by the standard) or NaN (MSD's) is none."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if math.isnan(slope) or slope == 0:
        return None
    inter = 0.0 if math.isnan(inter) else inter
    if math.isinf(slope) or math.isinf(inter):
        raise UnreadableError(path, f"scl_slope={slope:g} and scl_inter={inter:g} can't scale voxels")
    return None if (slope, inter) == (1.0, 0.0) else (slope, inter)


def _affine(path: Path, header: Any) -> npt.NDArray[np.float64]:
    """Voxel to RAS mm: the sform, else the qform, else the voxel sizes, whichever first is set and invertible."""
    for candidate in (header.get_sform, header.get_qform):
        try:
            affine = candidate(coded=True)[0]
        except (ValueError, np.linalg.LinAlgError):  # a qform whose quaternion is none
            continue
        if affine is not None and _invertible(affine):
            break
    else:
        affine = header.get_base_affine()
        if not _invertible(affine):
            sizes = [float(v) for v in header["pixdim"][1:4]]
            raise UnreadableError(path, f"no usable geometry: no invertible sform or qform, voxel sizes {sizes}")
    affine = np.array(affine, dtype=np.float64)
    affine[:3] *= _TO_MM.get(header.get_xyzt_units()[0], 1.0)
    return affine


def _invertible(affine: npt.NDArray[np.float64]) -> bool:
    if not np.isfinite(affine).all():
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return bool((sizes > 0).all() and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3)


def _load(path: Path, *, labels: bool) -> tuple[_Layout, npt.NDArray[Any]]:
    """Layout, and the stored values as (C, X, Y, Z) in the file's own axes."""
    size = require_file(path)
    with _open(path) as stream:
        layout = _parse(path, stream, size, labels=labels)
        # A large bytearray is zero pages until it is written to: memory grows with what the file truly holds.
        data = bytearray(layout.nbytes)
        view, done = memoryview(data), 0
        while done < len(data):
            count = stream.readinto(view[done : done + 2**24])  # type: ignore[attr-defined]
            if not count:
                raise UnreadableError(path, f"truncated: {done:,} of {len(data):,} bytes of voxels")
            done += count
        if layout.compressed and len(stream.read(_SLACK + 1)) > _SLACK:  # reading on to the end checks gzip's CRC
            raise UnreadableError(path, f"more data than the {layout.nbytes:,} bytes that its header claims")
    values = np.frombuffer(data, dtype=layout.dtype)
    if layout.dtype.names is not None:
        values = np.stack([values[name] for name in layout.dtype.names[:3]])
    # Fortran order: the first axis runs fastest, so the last of the shape, reversed, is C order.
    return layout, values.reshape((layout.channels, *layout.shape[::-1])).transpose(0, 3, 2, 1)


def _turn(values: npt.NDArray[Any], layout: _Layout) -> npt.NDArray[Any]:
    """(C, X, Y, Z) in file axes to RAS+ (a view), or to (C, rows, columns) where there is one slice."""
    if layout.flat:
        return values[..., 0].transpose(0, 2, 1)
    turned = nib.apply_orientation(values.transpose(1, 2, 3, 0), layout.turn)
    return cast("npt.NDArray[Any]", turned.transpose(3, 0, 1, 2))


def _turned(layout: _Layout) -> tuple[tuple[int, ...], npt.NDArray[np.float64]]:
    """Spatial shape and affine after :func:`_turn`."""
    if layout.flat:
        return layout.shape[1::-1], layout.affine[:, [1, 0, 2, 3]]
    order = np.argsort(layout.turn[:, 0])
    affine = layout.affine @ nib.orientations.inv_ornt_aff(layout.turn, layout.shape)
    return tuple(layout.shape[int(axis)] for axis in order), affine


def _spacing(affine: npt.NDArray[np.float64], ndim: int) -> tuple[float, ...]:
    return tuple(float(v) for v in voxel_sizes(affine)[:ndim])
