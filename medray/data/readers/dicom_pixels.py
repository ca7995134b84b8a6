"""From the stored pixels of a DICOM file to values.

In this order: the transfer syntax's decoder (pydicom's own and pylibjpeg's); YBR and palettes to RGB; MONOCHROME1
inverted over the range of its stored bits, so that more is brighter, except in CT and PET, whose values are quantities
and not shades; the modality LUT (slope and intercept, per frame where given so, or a table); padding pixels, which are
no anatomy, to the frame's smallest other value. The value-of-interest window is display only and isn't applied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.data.readers.guard import MAX_VALUES, reading, require_ratio, require_shape
from medray.errors import UnreadableError

_QUANTITIES = {"CT", "PT"}
_RLE = "1.2.840.10008.1.2.5"


def decode(path: Path, dataset: Any) -> npt.NDArray[np.float32]:
    """All frames of a data set as (frames, rows, columns, channels).

    Raises:
        UnreadableError: no pixels, truncated or damaged ones, or no decoder for their transfer syntax.
    """
    from pydicom.pixels import apply_color_lut, get_decoder

    with reading(path, "DICOM pixel data"):
        rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
        count = int(dataset.get("NumberOfFrames") or 1)
        syntax = _syntax(path, dataset)
        _require_sound(path, dataset, syntax, (count, rows, columns, samples))
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise UnreadableError(path, f"pixels in transfer syntax {syntax.name}, which has no decoder") from None
        # For RLE pydicom's own decoder: the faster one panics on damaged data.
        plugin = "pydicom" if syntax == _RLE else ""
        stored, facts = decoder.as_array(dataset, raw=False, decoding_plugin=plugin)
        meaning = str(facts["photometric_interpretation"])
        if meaning == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)[..., :3]
            stored = stored >> 8 if stored.dtype.itemsize == 2 else stored
            samples = 3
        stored = stored.reshape(count, rows, columns, samples)
        if samples > 1:
            return stored.astype(np.float32)
        values = stored.astype(np.float32)
        if meaning == "MONOCHROME1" and dataset.get("Modality") not in _QUANTITIES and stored.dtype.kind in "iu":
            bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
            values = (-1.0 if stored.dtype.kind == "i" else float(2**bits - 1)) - values
        values = _modality_lut(dataset, values)
        padding = _padding(dataset, stored)
        if padding is not None:
            for frame, outside in zip(values, padding, strict=True):
                if outside.any() and not outside.all():
                    frame[outside] = frame[~outside].min()
        return values


def _syntax(path: Path, dataset: Any) -> Any:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    meta = getattr(dataset, "file_meta", None)
    syntax = None if meta is None else meta.get("TransferSyntaxUID")
    if syntax is None:  # a file without its meta group: what pydicom guessed while it read is what there is
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        if meta is None:
            raise UnreadableError(path, "has no transfer syntax")
        meta.TransferSyntaxUID = syntax
    return syntax


def _require_sound(path: Path, dataset: Any, syntax: Any, shape: tuple[int, int, int, int]) -> None:
    """Hold the header's claims against the size of the pixel data and what compressed frames say of themselves."""
    count, rows, columns, samples = shape
    data = next(
        (dataset[k].value for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if k in dataset), None
    )
    if not data:
        raise UnreadableError(path, "holds no pixels (truncated, or headers only)")
    require_shape(path, (rows, columns), samples)
    if count < 1 or count * rows * columns * samples > MAX_VALUES:
        raise UnreadableError(
            path, f"the header claims {count} frames of {rows} x {columns}; at most {MAX_VALUES:,} values are read"
        )
    if not syntax.is_encapsulated:
        need = count * rows * columns * samples * int(dataset.BitsAllocated) // 8
        if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
            need = need // 3 * 2
        if len(data) < need:
            raise UnreadableError(path, f"truncated: {len(data):,} of {need:,} bytes of pixels")
        return
    require_ratio(path, 4 * count * rows * columns * samples, len(data), deflate=False)
    from pydicom.encaps import generate_frames

    if count > len(data) // 8:
        raise UnreadableError(path, f"the header claims {count} frames in {len(data):,} bytes of pixel data")
    found = 0
    for frame in generate_frames(data, number_of_frames=count):
        found += 1
        size = codestream_size(frame)
        if size is not None and size != (rows, columns, samples):
            raise UnreadableError(
                path,
                f"frame {found} is compressed as {size[0]} x {size[1]} with {size[2]} channels, the header says "
                f"{rows} x {columns} with {samples}",
            )
        if size is None and syntax != _RLE and not syntax.startswith("1.2.840.10008.1.2.4.1"):
            raise UnreadableError(path, f"frame {found} of {count} is no {syntax.name} stream")
    if found != count:
        raise UnreadableError(path, f"truncated: {found} of {count} frames")


def codestream_size(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) that a JPEG, JPEG-LS or JPEG 2000 stream says of itself; None where it is none.

    Decoders allocate by these numbers, not by DICOM's. Markers: ITU-T T.81 table B.1, T.87 C.1.1, T.800 A.5.1 (SIZ).
    """
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096) if not frame.startswith(b"\xff\xd8") else -1
    if start >= 0:
        siz = frame[start + 4 : start + 4 + 38]
        if len(siz) < 38:
            return None
        right, lower, left, upper = (int.from_bytes(siz[4 + 4 * i : 8 + 4 * i], "big") for i in range(4))
        return lower - upper, right - left, int.from_bytes(siz[36:38], "big")
    for marker, segment in _segments(frame):
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            if len(segment) < 6:
                return None
            return int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big"), segment[5]
    return None


def _segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, payload) of a JPEG stream up to its first scan."""
    if not frame.startswith(b"\xff\xd8"):
        return
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            return
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0xDA, 0xD9):
            return
        length = int.from_bytes(frame[at + 2 : at + 4], "big")
        if length < 2:
            return
        yield marker, frame[at + 4 : at + 2 + length]
        at += 2 + length


def _modality_lut(dataset: Any, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``values`` (frames, rows, columns, 1) through slope and intercept, or through a table."""
    if dataset.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return apply_modality_lut(values.astype(np.int32), dataset).astype(np.float32)
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or [{}] * len(values)
    for frame, group in zip(values, groups, strict=True):
        found = group.get("PixelValueTransformationSequence") or shared.get("PixelValueTransformationSequence")
        source = found[0] if found else dataset
        slope, intercept = _float(source, "RescaleSlope", 1.0), _float(source, "RescaleIntercept", 0.0)
        if slope == 0:
            raise ValueError("RescaleSlope is 0")
        if (slope, intercept) != (1.0, 0.0):
            frame *= np.float32(slope)
            frame += np.float32(intercept)
    return values


def _float(source: Any, keyword: str, default: float) -> float:
    value = source.get(keyword)
    return default if value is None or not str(value).strip() else float(value)


def _padding(dataset: Any, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    """Where pixels are padding (PS3.3 C.7.5.1.1.2), as ``stored``; None where the file names none."""
    value = dataset.get("PixelPaddingValue")
    if value is None or stored.dtype.kind not in "iu":
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted(_signed(dataset, int(v)) for v in (value, value if limit is None else limit))
    return (stored >= ends[0]) & (stored <= ends[1])


def _signed(dataset: Any, value: int) -> int:
    """A padding value is often written as unsigned where pixels are signed."""
    bits = int(dataset.BitsAllocated)
    return value - 2**bits if int(dataset.get("PixelRepresentation") or 0) == 1 and value >= 2 ** (bits - 1) else value
