"""What every reader does against bad input: one error, bounded memory, finite values, integer labels.

A file's header is a claim. It is checked against the file's own size and the limits below before anything of that size
is allocated, since a damaged or hostile header can claim terabytes.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import MedrayError, UnreadableError

MAX_VALUES = 2**30
"""Most values (voxels times channels) of one image: 4 GiB as float32, such as a CT of 512 x 512 x 4096."""

MAX_PIXELS = 2**27
"""Most pixels of one 2-D image, 134 million; whole microscope slides have to be cut into regions before."""

DEFLATE_RATIO = 1032
"""No deflate stream (gzip, zip, PNG) decodes to more than this many times its size."""

BOMB_RATIO, BOMB_BYTES = 250, 2**28
"""An *image* that claims to decode to more than both is a decompression bomb: real ones shrink by less than 20. Label
maps, which are mostly one value, are held to DEFLATE_RATIO alone."""

MAX_EXTENT_MM, MIN_SPACING_MM = 10_000.0, 1e-5
"""No patient is longer than ten metres, no voxel smaller than ten nanometres: beyond it the header is damaged, and
resampling would be asked for an absurd array."""


@contextmanager
def reading(path: object, what: str = "file") -> Iterator[None]:
    """Turn whatever a decoder raises into an :class:`UnreadableError` that names ``path`` and the cause.

    Raises:
        UnreadableError: for any error other than a MedrayError, which passes unchanged.
    """
    try:
        yield
    except MedrayError:
        raise
    except FileNotFoundError:
        raise UnreadableError(path, "no such file; check the path in the table or manifest") from None
    except MemoryError:
        raise UnreadableError(path, f"the {what} needs more memory than this machine has") from None
    except OSError as error:
        raise UnreadableError(path, f"the {what} can't be read ({error.strerror or one_line(error)})") from error
    except Exception as error:
        raise UnreadableError(path, f"damaged {what} ({type(error).__name__}: {one_line(error)})") from error
    except BaseException as error:
        # Decoders written in Rust panic with an exception that is no Exception; Ctrl-C and exits must pass.
        if type(error).__name__ != "PanicException":
            raise
        raise UnreadableError(path, f"damaged {what} (the decoder gave up: {one_line(error)})") from error


def one_line(error: object) -> str:
    """An error's text as one line of at most 200 characters, fit for a message."""
    text = " ".join(str(error).split()) or "no message"
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 200 else text[:197] + "..."


def require_file(path: Path) -> int:
    """Size in bytes of a regular, non-empty file. Pipes and devices are refused: reading one may never end.

    Raises:
        UnreadableError: it is missing, empty, or no regular file.
    """
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(path, "not a regular file; name an image file, or a directory with one DICOM series")
    if status.st_size == 0:
        raise UnreadableError(path, "the file is empty (0 bytes); copy it again from its source")
    return status.st_size


def require_shape(path: object, shape: Sequence[int], channels: int = 1) -> None:
    """Refuse shapes that are empty or beyond MAX_VALUES (or, in 2-D, MAX_PIXELS).

    Raises:
        UnreadableError: stating the shape and the limit.
    """
    text = " x ".join(str(n) for n in shape) + (f" with {channels} channels" if channels != 1 else "")
    if channels < 1 or not shape or any(n < 1 for n in shape):
        raise UnreadableError(path, f"the header claims an image of {text}, which holds nothing")
    if math.prod(shape) * channels > MAX_VALUES or (len(shape) == 2 and math.prod(shape) > MAX_PIXELS):
        limit = f"{MAX_PIXELS:,} pixels" if len(shape) == 2 else f"{MAX_VALUES:,} values"
        raise UnreadableError(
            path,
            f"the header claims an image of {text}; at most {limit} are read. Cut or resample it, or mend the file",
        )


def require_ratio(path: object, claimed: int, stored: int, *, labels: bool = False, deflate: bool = True) -> None:
    """Refuse a compressed file whose claimed size its own size can't honestly hold.

    Args:
        claimed: bytes after decoding.
        stored: bytes on disk.
        labels: a label map, which may be almost empty.
        deflate: the compression is deflate, which has a largest ratio.

    Raises:
        UnreadableError: the claim is impossible, or a decompression bomb.
    """
    impossible = deflate and claimed > DEFLATE_RATIO * stored + 2**16
    if impossible or (not labels and claimed > BOMB_BYTES and claimed > BOMB_RATIO * stored):
        raise UnreadableError(
            path,
            f"the header claims {claimed:,} bytes of image in {stored:,} of file: truncated, damaged, or a bomb",
        )


def require_spacing(path: object, spacing: Sequence[float], shape: Sequence[int]) -> None:
    """Refuse voxel sizes that no scan has.

    Raises:
        UnreadableError: a spacing is not finite, below MIN_SPACING_MM, or makes the image longer than MAX_EXTENT_MM.
    """
    for step, length in zip(spacing, shape, strict=True):
        if not math.isfinite(step) or step < MIN_SPACING_MM or step * length > MAX_EXTENT_MM:
            raise UnreadableError(
                path,
                f"the header claims a spacing of {' x '.join(f'{s:g}' for s in spacing)} mm for "
                f"{' x '.join(map(str, shape))} voxels; spacings of at least {MIN_SPACING_MM:g} mm and lengths of at "
                f"most {MAX_EXTENT_MM / 1000:g} m are believed",
            )


def finite(path: object, array: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], int]:
    """Replace NaN and -inf by the channel's smallest finite value, +inf by its largest, in place.

    The smallest value is background in practice (air in CT, 0 in a skull-stripped MR), which is what NaN stands for.

    Args:
        array: (C, *spatial) float32.

    Returns:
        The array, and how many values were replaced.

    Raises:
        UnreadableError: a channel has no finite value at all.
    """
    bad = ~np.isfinite(array)
    count = int(np.count_nonzero(bad))
    if count:
        for channel, wrong in zip(array, bad, strict=True):
            good = channel[~wrong]
            if good.size == 0:
                raise UnreadableError(path, "no voxel has a finite value (all are NaN or infinite)")
            low, high = good.min(), good.max()
            channel[wrong] = np.where(channel[wrong] == np.inf, high, low)
    return array, count


def to_labels(path: object, values: npt.NDArray[Any]) -> npt.NDArray[np.integer[Any]]:
    """Values of any real type as labels: uint8 where they fit 0..255, int32 otherwise. Nothing is rounded away.

    Raises:
        UnreadableError: fractions (a probability map, or a mask that was interpolated), NaN, or values beyond 32 bits.
    """
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        rounded = np.rint(values)
        wrong = ~(np.abs(values - rounded) <= 1e-3)
        if wrong.any():
            example = float(values[wrong].flat[0])
            raise UnreadableError(
                path,
                f"a mask holds whole numbers, one a class, but this one {example:g}; resample by nearest neighbour",
            )
        values = rounded
    elif values.dtype.kind not in "iu":
        raise UnreadableError(path, f"a mask holds whole numbers, but this one has values of type {values.dtype}")
    low, high = values.min(), values.max()
    if low < -(2**31) or high >= 2**31:
        raise UnreadableError(path, f"labels must fit 32 bits, but this mask spans {low} to {high}")
    return values.astype(np.uint8 if low >= 0 and high <= 255 else np.int32)
