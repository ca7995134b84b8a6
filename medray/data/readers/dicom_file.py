"""One DICOM file: opened safely, told apart from objects that aren't images, and its frames found."""

from __future__ import annotations

import logging
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from medray.data.image import Modality
from medray.data.readers.dicom_grid import Frame
from medray.data.readers.guard import reading, require_file, require_shape
from medray.errors import MissingDependencyError, UnreadableError

MODALITIES: dict[str, Modality] = {
    "CT": "CT",
    "MR": "MR",
    **dict.fromkeys(("CR", "DX", "DR", "MG", "RG", "XA", "RF", "PX", "IO", "RTIMAGE"), "XR"),
    **dict.fromkeys(("US", "IVUS", "BDUS"), "US"),
    "OP": "fundus",
    "DMS": "dermoscopy",
    **dict.fromkeys(("SM", "GM"), "microscopy"),
}  # type: ignore[assignment]

_NO_IMAGES = {
    "1.2.840.10008.1.3.10": "a DICOMDIR index; name the directory of one series instead",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation (SEG); it can be a mask, not an image",
    "1.2.840.10008.5.1.4.1.1.66.7": "a label map segmentation (SEG); it can be a mask, not an image",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.481.3": "a radiotherapy structure set; turn it into a label map first",
}
_NO_IMAGE_FAMILIES = {
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report (SR)",
    "1.2.840.10008.5.1.4.1.1.104.": "an encapsulated document (PDF, CDA or model)",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.9.": "a waveform",
    "1.2.840.10008.5.1.4.1.1.66": "a registration, surface or raw data object",
    "1.2.840.10008.5.1.4.1.1.67": "a real world value mapping",
    "1.2.840.10008.5.1.4.1.1.91.": "bulk annotations",
}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MAX_INFLATED = 2**31
_MAX_FRAMES = 2**16


def looks_bare(head: bytes) -> bool:
    """Whether a file that lacks DICOM's preamble begins like a data set: group 2 or 8, then a VR or a short length."""
    little, big = head[:2] in (b"\2\0", b"\x08\0"), head[:2] in (b"\0\2", b"\0\x08")
    if len(head) < 8 or not (little or big):
        return False
    if head[4:6].isalpha() and head[4:6].isupper():
        return True
    return little and int.from_bytes(head[4:8], "little") < 1024


def load(path: Path, *, pixels: bool) -> Any:
    """The data set of a file, with or without its pixels.

    Raises:
        UnreadableError: missing, empty, damaged, or no DICOM.
        MissingDependencyError: pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError:
        raise MissingDependencyError("pydicom", "reading DICOM", "pip install 'pydicom>=3,<4'") from None
    # What pydicom warns of (odd value representations, lengths) is either harmless or becomes an error of ours below.
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    with reading(path, "DICOM file"):
        require_file(path)
        with path.open("rb") as file:
            head = file.read(144)
        try:
            _require_deflated_sane(path, head)
            return pydicom.dcmread(path, stop_before_pixels=not pixels, force=looks_bare(head))
        except InvalidDicomError:
            raise UnreadableError(path, "no DICOM file: neither the DICM prefix nor a data set at its start") from None


def _require_deflated_sane(path: Path, head: bytes) -> None:
    """Inflate a deflated data set without keeping it: pydicom would do so in one piece, whatever it grows to."""
    if head[128:132] != b"DICM" or head[132:140] != b"\2\0\0\0UL\4\0":
        return
    end = 144 + int.from_bytes(head[140:144], "little")
    with path.open("rb") as file:
        meta = file.read(min(end, 2**16))
        if _DEFLATED.encode() not in meta[144:]:
            return
        file.seek(end)
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflater.unconsumed_tail or file.read(2**16):
            total += len(inflater.decompress(chunk, 2**22))
            if total > _MAX_INFLATED:
                raise UnreadableError(path, f"inflates to more than {_MAX_INFLATED:,} bytes: a decompression bomb")
            if inflater.eof:
                break


def not_an_image(dataset: Any) -> str | None:
    """What the object is, if it is no image; None for images."""
    uid = str(dataset.get("SOPClassUID") or getattr(dataset, "file_meta", {}).get("MediaStorageSOPClassUID") or "")
    for prefix, text in _NO_IMAGE_FAMILIES.items():
        if uid not in _NO_IMAGES and uid.startswith(prefix):
            return text
    if uid in _NO_IMAGES:
        return _NO_IMAGES[uid]
    if "Rows" not in dataset or "Columns" not in dataset:
        return "an object without pixels" + (f" (modality {dataset.Modality})" if dataset.get("Modality") else "")
    return None


def modality(dataset: Any) -> Modality:
    """Our word for the file's modality."""
    return MODALITIES.get(str(dataset.get("Modality") or "").upper(), "other")


def find_frames(path: Path, dataset: Any) -> list[Frame]:
    """The frames of an image object with their geometry.

    Raises:
        UnreadableError: no image; frames without positions (a film); tiles of a slide; a Siemens mosaic; absurd sizes.
    """
    with reading(path, "DICOM header"):
        reason = not_an_image(dataset)
        if reason is not None:
            raise UnreadableError(path, f"no image but {reason}")
        count = int(dataset.get("NumberOfFrames") or 1)
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        require_shape(path, (rows, columns), int(dataset.get("SamplesPerPixel") or 1))
        if not 1 <= count <= _MAX_FRAMES:
            raise UnreadableError(path, f"the header claims {count} frames; 1 to {_MAX_FRAMES} are read")
        if "MOSAIC" in (dataset.get("ImageType") or ()):
            raise UnreadableError(path, "a Siemens mosaic (many slices tiled in one picture); convert it with dcm2niix")
        groups = dataset.get("PerFrameFunctionalGroupsSequence")
        if count > 1 and str(dataset.get("Modality")) == "SM":
            raise UnreadableError(path, f"a whole slide in {count} tiles; export the region of interest as a picture")
        if groups:
            return functional_frames(path, dataset)
        if count > 1:
            raise UnreadableError(
                path, f"{count} frames without positions in space (a film?); export the frames as pictures, one a file"
            )
        return [
            Frame(
                path=path,
                index=0,
                instance=str(dataset.get("SOPInstanceUID") or path),
                number=_number(dataset),
                size=(rows, columns),
                position=_vector(dataset.get("ImagePositionPatient"), 3),
                orientation=_vector(dataset.get("ImageOrientationPatient"), 6),
                spacing=_pixel_spacing(dataset),
                thickness=_positive(dataset.get("SliceThickness")),
            )
        ]


def functional(dataset: Any, frame: Any, sequence: str) -> Any:
    """The item of a functional group (PS3.3 C.7.6.16): the frame's own, else the one that all share, else empty."""
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [{}])[0]
    found = frame.get(sequence) or shared.get(sequence)
    return found[0] if found else {}


def functional_frames(path: Path, dataset: Any) -> list[Frame]:
    """Frames of an object with functional groups: enhanced images and segmentations.

    Raises:
        UnreadableError: fewer or more descriptions than frames.
    """
    count, groups = int(dataset.get("NumberOfFrames") or 1), dataset.get("PerFrameFunctionalGroupsSequence") or ()
    if len(groups) != count:
        raise UnreadableError(path, f"the header claims {count} frames but describes {len(groups)}")
    frames = []
    for index, group in enumerate(groups):
        measures = functional(dataset, group, "PixelMeasuresSequence")
        position = functional(dataset, group, "PlanePositionSequence").get("ImagePositionPatient")
        orientation = functional(dataset, group, "PlaneOrientationSequence").get("ImageOrientationPatient")
        frames.append(
            Frame(
                path=path,
                index=index,
                instance=f"{dataset.get('SOPInstanceUID')}/{index}",
                number=index,
                size=(int(dataset.Rows), int(dataset.Columns)),
                position=_vector(position, 3),
                orientation=_vector(orientation, 6),
                spacing=_vector(measures.get("PixelSpacing"), 2),
                thickness=_positive(measures.get("SliceThickness")),
            )
        )
    return frames


def _pixel_spacing(dataset: Any) -> tuple[float, ...] | None:
    """(between rows, between columns) in mm: at the patient where calibrated, else at the detector."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = _vector(dataset.get(keyword), 2)
        if spacing is not None and min(spacing) > 0:
            return spacing
    return None


def _vector(value: Any, length: int) -> tuple[float, ...] | None:
    """``length`` finite numbers, or None for an absent or empty element."""
    if value is None or isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) == 0:
        return None
    numbers = tuple(float(v) for v in value)
    if len(numbers) != length or not np.isfinite(numbers).all():
        raise ValueError(f"{length} finite numbers are needed, the header has {list(value)}")
    return numbers


def _positive(value: Any) -> float | None:
    number = float(value) if value is not None and str(value).strip() else 0.0
    return number if np.isfinite(number) and number > 0 else None


def _number(dataset: Any) -> int:
    value = dataset.get("InstanceNumber")
    return int(value) if value is not None and str(value).strip() else 0
