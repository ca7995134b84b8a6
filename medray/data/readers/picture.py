"""Pictures: PNG, JPEG, TIFF, BMP and GIF, 8 or 16 bits, as (C, rows, columns).

- Grey stays one channel, colour becomes three (RGB); CMYK, YCbCr and palettes are converted, a palette of greys to one
  channel. Alpha is dropped. Values stay in the file's own units: 0..255, 0..65535, or a float TIFF's.
- The picture is turned as its EXIF orientation says, image and mask alike.
- One picture a file: a TIFF or GIF of several pages has neither spacing nor a promise that its pages are slices, so it
  is refused; a stack belongs into NIfTI. Of a camera's MPO (a JPEG with a preview behind it) the first is taken.

Masks: the stored number is the label; a palette image gives its indices. A picture whose only values are 0 and its
largest (255, or 65535 in 16 bits) is a binary mask and becomes 0 and 1. Colour whose channels are equal counts as grey;
true colours are refused, since one file can't tell which colour is which class. A JPEG is lossy: its mask has to
be black and white, and is cut at half.

``Image.original``: ``format`` "picture"; ``path``; ``shape`` (rows, columns) as stored; ``exif`` the orientation 1..8;
``bits`` per channel; ``nonfinite``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags
from PIL import Image as Pillow

from medray.data.image import Image, Mask
from medray.data.readers.guard import (
    finite,
    reading,
    require_file,
    require_ratio,
    require_shape,
    to_labels,
)
from medray.data.readers.header import Header
from medray.errors import MissingDependencyError, UnreadableError

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF")  # an MPO opens as a JPEG
_GREY = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_LOSSY = {"JPEG", "MPO"}
warnings.filterwarnings("ignore", category=Pillow.DecompressionBombWarning)  # _check has a limit of its own


def read_image(path: Path) -> Image:
    """Read a picture as (1, H, W) or (3, H, W).

    Raises:
        UnreadableError: it is damaged, truncated, too large, has several pages, or is no picture.
    """
    with reading(path, "picture"):
        size = require_file(path)
        with _open(path) as picture:
            _check(path, picture, size, labels=False)
            stored, exif = (picture.height, picture.width), _exif(picture)
            pixels = _decode_deep(path) if _deep_colour(path, picture) else _decode(picture)
        bands = pixels[..., None] if pixels.ndim == 2 else pixels[..., : 1 if pixels.shape[2] < 3 else 3]
        array = np.ascontiguousarray(_turned(bands, exif).transpose(2, 0, 1), dtype=np.float32)
        array, nonfinite = finite(path, array)
        original = {
            "format": "picture",
            "path": str(path),
            "shape": stored,
            "exif": exif,
            "bits": 8 * pixels.dtype.itemsize,
            "nonfinite": nonfinite,
        }
        return Image(array=array, spacing=None, source=str(path), original=original)


def read_mask(path: Path) -> Mask:
    """Read a label map (H, W); the module's own text says which number is which label.

    Raises:
        UnreadableError: as :func:`read_image`; or it has true colours, or is a JPEG of more than black and white.
    """
    with reading(path, "picture"):
        size = require_file(path)
        with _open(path) as picture:
            _check(path, picture, size, labels=True)
            lossy, exif = picture.format in _LOSSY, _exif(picture)
            indexed = picture.mode in ("P", "PA") and not _black_and_white(picture)
            if _deep_colour(path, picture):
                pixels = _decode_deep(path)
            elif indexed or picture.mode in _GREY:
                pixels = np.asarray(picture)
            else:
                pixels = np.asarray(picture.convert("RGB"))
        if pixels.ndim == 3:
            colours = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1]  # what follows is alpha
            if (colours != colours[..., :1]).any():
                raise UnreadableError(
                    path, "a colour picture is no mask; save class numbers 0, 1, 2 … as a grey or palette PNG"
                )
            pixels = colours[..., 0]
        if lossy:
            if ((pixels > 48) & (pixels < 208)).any():
                raise UnreadableError(
                    path, "JPEG blurs class numbers; save this mask as PNG (only black and white pass)"
                )
            pixels = pixels >= 128
        labels = to_labels(path, _turned(pixels, exif))
        white = 65535 if labels.max() > 255 else 255
        if not indexed and ((labels == 0) | (labels == white)).all():
            labels = (labels == white).astype(np.uint8)
        return Mask(array=np.ascontiguousarray(labels), spacing=None, source=str(path))


def probe(path: Path) -> Header:
    """Shape and channels without decoding pixels.

    Raises:
        UnreadableError: as :func:`read_image`, as far as the header tells.
    """
    with reading(path, "picture"):
        size = require_file(path)
        with _open(path) as picture:
            _check(path, picture, size, labels=True)
            shape = (picture.height, picture.width)
            grey = picture.mode in _GREY or (picture.mode in ("P", "PA") and _grey_palette(picture))
            return Header(shape=shape[::-1] if _exif(picture) >= 5 else shape, channels=1 if grey else 3, spacing=None)


@contextmanager
def _open(path: Path) -> Iterator[Pillow.Image]:
    """Naming the formats keeps Pillow's other plug-ins (PostScript among them) out of reach of a stranger's file.

    Pillow is given an open file, not a path: given a path it maps an uncompressed TIFF into memory, and then (13.0)
    mixes up rows and columns where the orientation swaps them.
    """
    with path.open("rb") as file:
        try:
            picture = Pillow.open(file, formats=_FORMATS)
        except Pillow.UnidentifiedImageError:
            raise UnreadableError(
                path, f"no picture, or its header is damaged; readable are {', '.join(_FORMATS)}"
            ) from None
        with picture:
            yield picture


def _check(path: Path, picture: Pillow.Image, size: int, *, labels: bool) -> None:
    channels = len(picture.getbands())
    require_shape(path, (picture.height, picture.width), channels)
    require_ratio(path, 4 * picture.height * picture.width * channels, size, labels=labels, deflate=False)
    if picture.format == "PNG":  # where a stream ends early Pillow fills the rest with zeros, in silence
        bits = 1 if channels == 1 else 8
        require_ratio(path, picture.height * picture.width * channels * bits // 8, size, labels=True)
    pages = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if pages > 1:
        raise UnreadableError(
            path,
            f"holds {pages} pages; save one picture a file, or a stack of slices as NIfTI, which keeps its spacing",
        )


def _deep_colour(path: Path, picture: Pillow.Image) -> bool:
    """Whether there are several channels of more than 8 bits, which Pillow would cut down to 8."""
    if picture.format == "PNG":  # Pillow keeps no bit depth: byte 24 of the file is IHDR's, byte 25 its colour type
        with path.open("rb") as file:
            depth, kind = file.read(26)[24:]
        return depth == 16 and kind in (2, 4, 6)
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
        return len(bits) > 1 and max(bits) > 8
    return False


def _decode_deep(path: Path) -> npt.NDArray[Any]:
    """(H, W, channels) at full depth, through ITK."""
    try:
        import SimpleITK
    except ImportError:
        raise MissingDependencyError("SimpleITK", "a picture of 16 bits per colour", "pip install SimpleITK") from None
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("PNGImageIO" if path.read_bytes()[:4] == b"\x89PNG" else "TIFFImageIO")
    return cast("npt.NDArray[Any]", SimpleITK.GetArrayFromImage(reader.Execute()))


def _decode(picture: Pillow.Image) -> npt.NDArray[Any]:
    """(H, W) or (H, W, channels), alpha behind the rest."""
    if picture.mode in ("P", "PA"):
        colours = np.asarray(picture.convert("RGB"))
        return colours[..., :1] if _grey_palette(picture) else colours
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode not in _GREY:
        picture = picture.convert("RGB")  # of RGBA it drops alpha, and doesn't blend
    return np.asarray(picture)


def _palette(picture: Pillow.Image) -> npt.NDArray[np.uint8]:
    """(colours, 3)."""
    return np.array(picture.getpalette("RGB") or [0, 0, 0], dtype=np.uint8).reshape(-1, 3)


def _grey_palette(picture: Pillow.Image) -> bool:
    palette = _palette(picture)
    return bool((palette == palette[:, :1]).all())


def _black_and_white(picture: Pillow.Image) -> bool:
    """Whether every colour that is used is black or white: then the colour, not its index, says which is foreground."""
    index = np.asarray(picture)
    used = np.unique(index[..., 0] if index.ndim == 3 else index)
    palette = _palette(picture)
    used = palette[used[used < len(palette)]]
    return bool(((used == 0).all(axis=1) | (used == 255).all(axis=1)).all())


def _exif(picture: Pillow.Image) -> int:
    """EXIF orientation; 1 (upright) where it is absent or damaged, and for TIFF, which Pillow turns itself."""
    if picture.format == "TIFF":
        return 1
    try:
        value = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata is no reason to refuse sound pixels
        return 1
    return value if 1 <= value <= 8 else 1


def _turned(pixels: npt.NDArray[Any], exif: int) -> npt.NDArray[Any]:
    """(H, W[, C]) as stored to upright, as a view (EXIF 2.32, tag Orientation)."""
    if exif >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if exif in (3, 4, 7, 8) else 1
    columns = -1 if exif in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]
