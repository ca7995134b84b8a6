"""From what a client sent to an image: told by content, held to limits, read from a private folder.

No name that a client gives becomes a path: files are numbered. The decoders are those of :mod:`medray.data.readers`.
"""

from __future__ import annotations

import gzip
import math
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from medray.data.image import Image
from medray.data.manifest import Case
from medray.data.readers import probe, read_case
from medray.data.readers.guard import finite, require_shape
from medray.engines.ray.serve.refusal import RefusedError, is_full
from medray.errors import MedrayError, UnreadableError

Kind = Literal["png", "jpeg", "tiff", "nifti", "dicom", "zip", "npy"]

_HEAD = 352
_CHUNK = 1 << 20
_ENTRY = 4096  # bytes of a zip's directory for each file, names and comments included
_PICTURES = ("png", "jpeg", "tiff")
_NIFTI_MAGIC = (b"n+1\0", b"n+2\0", b"ni1\0", b"ni2\0")
_UNSPECIFIED = {"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"}
"""What clients say who don't say; the last is curl's own for --data-binary."""
_GZIP = {"application/gzip", "application/x-gzip"}
TYPES: dict[Kind, set[str]] = {
    "png": {"image/png"},
    "jpeg": {"image/jpeg", "image/jpg"},
    "tiff": {"image/tiff"},
    "nifti": {"application/nifti", "application/x-nifti", "application/vnd.nifti", "image/nifti", *_GZIP},
    "dicom": {"application/dicom"},
    "zip": {"application/zip", "application/x-zip-compressed"},
    "npy": {"application/x-npy", "application/npy"},
}
"""Media types that agree with each kind of content."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file that arrived: where it was put, and what the client called its type."""

    path: Path
    content_type: str = ""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """``unpacked``: bytes of an image as float32, and of a zip's files together; ``files``: of a zip."""

    unpacked: int
    files: int


def sniff(path: Path) -> Kind:
    """What a file is, by content.

    Raises:
        RefusedError: 400 for an empty one, 415 for one of no known kind.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise RefusedError(
            400, "empty", "the body is empty; send the image's bytes, such as curl --data-binary @scan.nii.gz"
        )
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[128:132] == b"DICM":  # before TIFF: its preamble may make the file one as well
        return "dicom"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "tiff"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if _is_nifti(head) or (head.startswith(b"\x1f\x8b") and _is_nifti(_unzipped_head(path))):
        return "nifti"
    raise RefusedError(
        415,
        "unknown-kind",
        "the content is of no kind that is read: PNG, JPEG, TIFF, NIfTI (.nii, .nii.gz), DICOM, a zip of one DICOM "
        "series, or .npy",
    )


def _is_nifti(head: bytes) -> bool:
    return head[344:348] in _NIFTI_MAGIC or head[4:8] in _NIFTI_MAGIC


def _unzipped_head(path: Path) -> bytes:
    try:
        with gzip.open(path, "rb") as stream:
            return stream.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return b""


def check_type(kind: Kind, content_type: str) -> None:
    """Hold content against what the client called it; a client that doesn't say is believed.

    Raises:
        RefusedError: 415, they contradict each other.
    """
    named = content_type.partition(";")[0].strip().lower()
    if named in _UNSPECIFIED or named in TYPES[kind]:
        return
    raise RefusedError(
        415,
        "wrong-type",
        f"Content-Type says {named[:80]!r} and the content is {kind}. Send {' or '.join(sorted(TYPES[kind]))}, or "
        "application/octet-stream",
    )


def read_upload(parts: Sequence[Part], folder: Path, *, ndim: int, bounds: Bounds) -> Image:
    """The image that was sent.

    Several DICOM files are one series; several files of other kinds are one image's channels, in their order.

    Args:
        parts: what arrived, within ``folder``.
        folder: private to this request; the caller removes it.
        ndim: of the images that the model takes, which says what the axes of an .npy are.
        bounds: of what is unpacked.

    Raises:
        RefusedError: whatever is wrong with it: 400, 413, 415 or 422.
    """
    if not parts:
        raise RefusedError(400, "empty", "no file was sent; a multipart body holds at least one part with a file")
    kinds = [sniff(part.path) for part in parts]
    for kind, part in zip(kinds, parts, strict=True):
        check_type(kind, part.content_type)
    if len(set(kinds)) > 1 and not set(kinds) <= set(_PICTURES):
        raise RefusedError(400, "mixed", f"send one image, not {' and '.join(sorted(set(kinds)))} together")
    try:
        match kinds[0]:
            case "zip":
                if len(parts) > 1:
                    raise RefusedError(400, "mixed", f"{len(parts)} zip files; send one, with one DICOM series")
                return _read([str(_unzip(parts[0].path, folder / "series", bounds))], bounds)
            case "npy":
                if len(parts) > 1:
                    raise RefusedError(400, "mixed", f"{len(parts)} .npy files were sent; send one (C, *spatial)")
                return _read_npy(parts[0].path, ndim, bounds)
            case "dicom" if len(parts) > 1:
                series = folder / "series"
                series.mkdir()
                for number, part in enumerate(parts):
                    part.path.rename(series / f"{number:05}.dcm")
                return _read([str(series)], bounds)
            case _:
                return _read([str(part.path) for part in parts], bounds)
    except UnreadableError as error:
        # The cause is the client's own data told back to the client; our path to it is nobody's business.
        raise RefusedError(
            422, "unreadable", error.cause.replace(str(folder), "").replace(str(error.path), "")
        ) from error
    except RefusedError:
        raise
    except MedrayError as error:
        raise RefusedError(422, "unreadable", str(error).replace(str(folder), "")) from error


def _read(references: Sequence[str], bounds: Bounds) -> Image:
    claimed = 0
    for reference in references:
        header = probe(reference, Path())
        claimed += 4 * header.channels * math.prod(header.shape)
    require_small(claimed, bounds)
    image, _, _ = read_case(Case(id="request", images=tuple(references)), Path())
    return image


def require_small(claimed: int, bounds: Bounds, how: str = "decoded") -> None:
    """Hold an image's bytes against the limit.

    Raises:
        RefusedError: 413, too many.
    """
    if claimed > bounds.unpacked:
        raise RefusedError(
            413,
            "too-large",
            f"the image is of {claimed:,} bytes once {how}; this server takes {bounds.unpacked:,} "
            "(limits.unpacked_mb). Crop or resample it",
        )


def _unzip(path: Path, folder: Path, bounds: Bounds) -> Path:
    """Unpack the DICOM files of a zip into ``folder``, numbered; what isn't DICOM (a DICOMDIR's notes) is passed over.

    The sizes that the archive claims are checked first, and the bytes that really come out are counted.
    """
    folder.mkdir()
    left = bounds.unpacked
    try:
        with path.open("rb") as file, _opened(file, bounds) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > bounds.files:
                raise RefusedError(413, "too-many", f"the zip has {len(members):,} files; {bounds.files:,} are taken")
            for number, member in enumerate(members):
                _require_plain(member)
                with archive.open(member) as stream:
                    left -= _copy(stream, folder / f"{number:05}.dcm", left, bounds)
    except RefusedError:
        raise
    except Exception as error:  # each method of compression has errors of its own
        if is_full(error):
            raise
        raise RefusedError(400, "bad-zip", f"the zip is damaged ({type(error).__name__}); pack it again") from error
    if not any(folder.iterdir()):
        raise RefusedError(422, "unreadable", "the zip holds no DICOM file; send other kinds without a zip")
    return folder


class _Guarded:
    """A file that refuses one read of more than ``most`` bytes; None: reads anything."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self.most: int | None = most
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, count: int = -1) -> bytes:
        if self.most is not None and count > self.most:
            raise RefusedError(413, "too-many", f"the zip's directory claims {count:,} bytes; {self.most:,} are taken")
        return self._file.read(count)


def _opened(file: IO[bytes], bounds: Bounds) -> zipfile.ZipFile:
    """The archive; its directory, which is read whole and becomes an object for each entry, is held to its limit."""
    guarded = _Guarded(file, max(1 << 17, bounds.files * _ENTRY))
    archive = zipfile.ZipFile(guarded)
    guarded.most = None
    return archive


def _require_plain(member: zipfile.ZipInfo) -> None:
    name = member.orig_filename.replace("\\", "/")
    tricks = name.startswith("/") or ".." in name.split("/") or "\0" in name or name[1:2] == ":"
    if tricks or stat.S_ISLNK(member.external_attr >> 16):
        raise RefusedError(400, "bad-zip", "the zip has a link or a path that leads out of it; pack plain files")
    if member.flag_bits & 0x1:
        raise RefusedError(400, "bad-zip", "the zip is encrypted; send it over TLS, without a password of its own")


def _copy(stream: IO[bytes], target: Path, left: int, bounds: Bounds) -> int:
    """Bytes that came out of ``stream``, kept in ``target`` if they are DICOM; never more than ``left``."""
    first = stream.read(_CHUNK)
    keep = first[128:132] == b"DICM"
    count = len(first)
    with target.open("wb") as file:
        chunk = first
        while chunk:
            if count > left:
                raise RefusedError(
                    413, "too-large", f"the zip unpacks to more than {bounds.unpacked:,} bytes (limits.unpacked_mb)"
                )
            if not keep:
                break
            file.write(chunk)
            chunk = stream.read(_CHUNK)
            count += len(chunk)
    if not keep:
        target.unlink()
    return count


def _read_npy(path: Path, ndim: int, bounds: Bounds) -> Image:
    """An array (*s) or (C, *s) of numbers; nothing is unpickled."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file, max_header_size=10_000)
        except Exception as error:  # NumPy evaluates the header: its tokenizer has errors of its own
            raise RefusedError(422, "unreadable", f"the .npy's header is damaged ({type(error).__name__})") from error
        if dtype.hasobject or dtype.kind not in "biuf" or dtype.itemsize > 16:
            raise RefusedError(422, "unreadable", f"the .npy holds {dtype}; send whole numbers or floats")
        if len(shape) not in (ndim, ndim + 1):
            raise RefusedError(
                422,
                "wrong-shape",
                f"the .npy has {len(shape)} axes; this model takes ({ndim} axes) or (C, {ndim} axes)",
            )
        channels, spatial = (shape[0], shape[1:]) if len(shape) == ndim + 1 else (1, shape)
        require_shape("the .npy", spatial, channels)
        require_small(4 * math.prod(shape), bounds)
        stored = path.stat().st_size - file.tell()
        if stored != math.prod(shape) * dtype.itemsize:
            raise RefusedError(
                422, "unreadable", f"the .npy claims {math.prod(shape) * dtype.itemsize:,} bytes and has {stored:,}"
            )
        values = np.fromfile(file, dtype=dtype, count=math.prod(shape)).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(values.reshape(channels, *spatial), dtype=np.float32)
    array, nonfinite = finite("the .npy", array)
    return Image(array=array, spacing=None, source="the .npy", original={"format": "npy", "nonfinite": nonfinite})
