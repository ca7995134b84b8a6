"""Label maps as DICOM Segmentation objects (DICOM PS3.3 A.51) that reference the series they were made from.

Each source instance gets its own segmentation frame, taken from the labels at the place where its pixels lie in the
patient: by ImagePositionPatient, ImageOrientationPatient and PixelSpacing, never by the order of files.

Legend: (X, Y, Z) is the label volume in RAS; (F, R, C) the source's frames, rows and columns; DICOM's own millimetres
are LPS, the opposite of RAS in the first two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medray import __version__
from medray.data.image import Image
from medray.data.writers.atomic import appearing
from medray.errors import DataError, MissingDependencyError, UnreadableError

_TOLERANCE = 0.05  # voxels: beyond it labels are taken from the nearest voxel, not copied
_FAR = 1.0  # voxels: a source pixel that lies farther outside the labels than this was not in the image
_TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What the object says about how it was made.

    Attributes:
        name: of the bundle.
        version: of the bundle or the program.
        note: the intended use; also the content description.
    """

    name: str
    version: str = __version__
    note: str = ""


def write_segmentation(
    path: Path,
    labels: npt.NDArray[np.integer[Any]],
    image: Image,
    *,
    classes: Sequence[str],
    algorithm: Algorithm,
    files: Sequence[Path | str] | None = None,
) -> None:
    """Write ``labels`` as a DICOM-SEG of binary segments, one for each foreground class that is present.

    Args:
        path: ending in .dcm.
        labels: (X, Y, Z) or (H, W) on the grid of ``image.array``.
        image: as the DICOM reader gave it.
        classes: names by label, background first.
        algorithm: that made the labels.
        files: the source instances; None for ``image.original["files"]``.

    Raises:
        DataError: labels of another shape, no source files, or a source that lies elsewhere than the labels.
        UnreadableError: a source file is gone or damaged.
        MissingDependencyError: highdicom is not installed.
    """
    try:
        import highdicom as hd
        from highdicom.seg import Segmentation
    except ImportError:
        raise MissingDependencyError("highdicom", "writing DICOM-SEG", "pip install highdicom") from None
    from pydicom.uid import ExplicitVRLittleEndian

    if labels.shape != image.shape:
        raise DataError(f"{path}: labels of shape {labels.shape} for an image of {image.shape}; they must be alike")
    sources = source_headers(files if files is not None else image.original.get("files", ()), image)
    frames = _frames(labels, image, sources)
    present = [value for value in range(1, len(classes)) if (frames == value).any()]
    # An object without any segment is not allowed: an empty answer describes the classes that were looked for.
    described = present or list(range(1, len(classes)))
    stacked = np.stack([frames == value for value in described], axis=-1)
    first = sources[0]
    try:
        segmentation = Segmentation(
            source_images=sources,
            pixel_array=stacked.astype(np.uint8),
            segmentation_type="BINARY",
            segment_descriptions=[
                _describe(number, classes[value], value, algorithm) for number, value in enumerate(described, start=1)
            ],
            series_instance_uid=hd.UID(),
            series_number=int(first.get("SeriesNumber") or 0) % 10_000 * 100 + 77,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medray",
            manufacturer_model_name=algorithm.name[:64] or "medray",
            software_versions=(f"medray {__version__}"[:64],),
            device_serial_number="none",
            content_description=algorithm.note[:64] or None,
            content_label="SEGMENTATION",
            series_description=f"{algorithm.name}: {algorithm.note}"[:64],
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=bool(present),
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path}: {image.source} can't be referenced by a DICOM-SEG ({type(error).__name__}: {error}). "
            "Convert the series to NIfTI first"
        ) from error
    with appearing(path) as partial:
        segmentation.save_as(partial)


def _describe(number: int, name: str, value: int, algorithm: Algorithm) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64] or f"class {value}",
        # Class names are the data set's own words: a private coding scheme says so, where a guess at SNOMED would lie.
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=class_code(name or f"class {value}"),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=algorithm.name[:64] or "medray",
            family=codes.cid7162.ArtificialIntelligence,
            version=algorithm.version[:64],
            source="medray",
        ),
        tracking_uid=hd.UID(),
        tracking_id=f"{name} {number}"[:64],
    )


def class_code(name: str) -> Any:
    """A class's own word as a code of our scheme; equal words have equal codes, and others others."""
    import highdicom as hd

    meaning = name.replace("\\", "/")[:64]  # a backslash would part it in two
    return hd.sr.CodedConcept("C" + hashlib.sha256(meaning.encode()).hexdigest()[:15], "99MEDRAY", meaning)


def source_headers(files: Sequence[Path | str], image: Image) -> list[Any]:
    """Headers of the source instances, with what the standard wants to be there, even if empty.

    Raises:
        DataError: there are no source files.
        UnreadableError: one is gone or damaged.
    """
    import pydicom

    if not files:
        raise DataError(f"{image.source}: it is not known which DICOM files it came from. Give the series itself")
    sources = []
    for file in dict.fromkeys(files):  # a multi-frame file is named once a frame
        try:
            # Not before the pixels but without them: the object refers to the instance, not to its values.
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            _to_unicode(dataset)
        except Exception as error:
            raise UnreadableError(file, f"can't be read again to be referenced ({error})") from error
        for keyword in _TYPE_2:
            if keyword not in dataset:
                setattr(dataset, keyword, "")
        if "FrameOfReferenceUID" not in dataset and "PixelSpacing" in dataset:
            # A projection: frames correspond pixel by pixel. With a spacing but no slice thickness, the object would
            # hold pixel measures that readers (highdicom's among them) refuse.
            del dataset.PixelSpacing
        sources.append(dataset)
    return sources


def _to_unicode(dataset: Any) -> None:
    """Decode all text by the source's own character set and go on in UTF-8: class names may be in any language."""
    dataset.decode()
    for element in dataset:
        if element.VR == "PN":
            element.value = [str(value) for value in element.value] if element.VM > 1 else str(element.value or "")
    dataset.SpecificCharacterSet = "ISO_IR 192"


def _frames(labels: npt.NDArray[np.integer[Any]], image: Image, sources: Sequence[Any]) -> npt.NDArray[np.uint8]:
    """Labels (F, R, C) under each source frame."""
    if labels.ndim == 2:
        if len(sources) != 1:
            raise DataError(f"{image.source}: a 2-D answer for {len(sources)} DICOM files; it refers to one")
        return labels[None].astype(np.uint8)
    if image.affine is None:
        raise DataError(f"{image.source}: a DICOM-SEG in 3-D needs the image's place in the patient (an affine)")
    to_voxel = np.linalg.inv(image.affine)
    frames = []
    for affine, rows, columns in (plane for source in sources for plane in _planes(source)):
        frames.append(_sample(labels, to_voxel @ affine, rows, columns, image.source))
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{image.source}: its instances differ in size; a DICOM-SEG needs equal frames")
    return np.stack(frames)


def _planes(source: Any) -> list[tuple[npt.NDArray[np.float64], int, int]]:
    """Of each frame: (row, column, 0, 1) to RAS mm as (4, 4), and its rows and columns."""

    def plane(position: Any, orientation: Any, spacing: Any) -> npt.NDArray[np.float64]:
        along_columns, along_rows = np.asarray(orientation[:3], dtype=float), np.asarray(orientation[3:], dtype=float)
        affine = np.eye(4)
        affine[:3, 0] = along_rows * float(spacing[0])  # the next row
        affine[:3, 1] = along_columns * float(spacing[1])  # the next column
        affine[:3, 2] = np.cross(along_columns, along_rows)
        affine[:3, 3] = np.asarray(position, dtype=float)
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine

    rows, columns = int(source.Rows), int(source.Columns)
    try:
        if "PerFrameFunctionalGroupsSequence" not in source:
            found = plane(source.ImagePositionPatient, source.ImageOrientationPatient, source.PixelSpacing)
            return [(found, rows, columns)]
        shared = source.SharedFunctionalGroupsSequence[0]
        planes = []
        for frame in source.PerFrameFunctionalGroupsSequence:

            def group(name: str, frame: Any = frame) -> Any:
                return (frame if name in frame else shared)[name].value[0]

            planes.append(
                plane(
                    group("PlanePositionSequence").ImagePositionPatient,
                    group("PlaneOrientationSequence").ImageOrientationPatient,
                    group("PixelMeasuresSequence").PixelSpacing,
                )
            )
        return [(found, rows, columns) for found in planes]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        name = source.get("SOPInstanceUID", "?")
        raise DataError(f"DICOM instance {name} does not say where it lies ({error}). Convert it to NIfTI") from error


def _sample(
    labels: npt.NDArray[np.integer[Any]], plane: npt.NDArray[np.float64], rows: int, columns: int, source: str
) -> npt.NDArray[np.uint8]:
    """Labels at the pixels of one frame; ``plane`` takes (row, column, 0, 1) to voxel indices of ``labels``."""
    corners = np.array([[r, c, 0, 1] for r in (0, rows - 1) for c in (0, columns - 1)], dtype=float) @ plane.T
    upper = np.array(labels.shape) - 1
    outside = np.maximum(-corners[:, :3], corners[:, :3] - upper).max()
    if outside > _FAR:
        raise DataError(
            f"{source}: a source slice lies {outside:.1f} voxels outside of the labels; they do not belong together"
        )
    steps = plane[:3, :2]
    whole = np.abs(steps - np.rint(steps)).max() * max(rows, columns) < _TOLERANCE
    if whole and (np.abs(np.rint(steps)).sum(axis=0) == 1).all() and _integral(corners[0, :3]):
        # Rows and columns run along axes of the volume: a slice of it, turned or mirrored, is the frame itself.
        index: list[Any] = [int(value) for value in np.rint(corners[0, :3])]
        for step, count in ((steps[:, 0], rows), (steps[:, 1], columns)):
            axis = int(np.abs(step).argmax())
            start, sign = index[axis], int(np.sign(step[axis]))
            index[axis] = np.arange(start, start + sign * count, sign)
        row_axis, column_axis = (int(np.abs(steps[:, k]).argmax()) for k in (0, 1))
        cut = labels[np.ix_(*(np.atleast_1d(part) for part in index))]
        other = 3 - row_axis - column_axis
        return cut.transpose(row_axis, column_axis, other)[..., 0].astype(np.uint8)
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    places = np.stack([r, c, np.zeros_like(r), np.ones_like(r)], axis=-1) @ plane.T
    nearest = np.clip(np.rint(places[..., :3]), 0, upper).astype(int)
    return labels[nearest[..., 0], nearest[..., 1], nearest[..., 2]].astype(np.uint8)


def _integral(place: npt.NDArray[np.float64]) -> bool:
    return bool(np.abs(place - np.rint(place)).max() < _TOLERANCE)
