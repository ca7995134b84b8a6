"""Figures of an answer as a DICOM Structured Report: a Measurement Report (DICOM PS3.16 TID 1500) that refers to the
series it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medray import __version__
from medray.data.image import Image
from medray.data.writers.atomic import appearing
from medray.data.writers.dicom_seg import Algorithm, class_code, source_headers
from medray.errors import DataError, MissingDependencyError

_SCHEME = "99MEDRAY"
_LONGEST = 64  # characters of a code's meaning


def write_report(
    path: Path,
    image: Image,
    *,
    probabilities: Mapping[str, float] | None = None,
    decided: Sequence[str] = (),
    volumes_ml: Mapping[str, float] | None = None,
    uncertainty: float | None = None,
    algorithm: Algorithm,
    files: Sequence[Path | str] | None = None,
) -> None:
    """Write an answer as a Comprehensive SR document.

    Args:
        path: ending in .dcm.
        image: as the DICOM reader gave it.
        probabilities: by class (classification), calibrated.
        decided: the classes decided for.
        volumes_ml: by class (segmentation), in millilitres.
        uncertainty: normalised entropy, 0 to 1.
        algorithm: that answered.
        files: the source instances; None for ``image.original["files"]``.

    Raises:
        DataError: no source files, or no figure at all, or a source that no report can refer to.
        UnreadableError: a source file is gone or damaged.
        MissingDependencyError: highdicom is not installed.
    """
    try:
        import highdicom as hd
    except ImportError:
        raise MissingDependencyError("highdicom", "writing DICOM-SR", "pip install highdicom") from None
    sources = source_headers(files if files is not None else image.original.get("files", ()), image)
    groups = [
        *(_likely(name, p, name in decided, algorithm) for name, p in (probabilities or {}).items()),
        *(_volume(name, ml, algorithm) for name, ml in (volumes_ml or {}).items()),
    ]
    if not groups:
        raise DataError(f"{path}: neither probabilities nor volumes: a report needs a figure; a 2-D mask has none")
    if uncertainty is not None:
        groups.append(_group("answer", "Uncertainty (normalised entropy)", uncertainty, algorithm))
    first = sources[0]
    try:
        document = hd.sr.ComprehensiveSR(
            evidence=sources,
            content=_content(groups, algorithm),
            series_instance_uid=hd.UID(),
            series_number=int(first.get("SeriesNumber") or 0) % 10_000 * 100 + 78,
            series_description=f"{algorithm.name}: {algorithm.note}"[:64],
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medray",
            is_complete=True,
            is_final=False,
            is_verified=False,  # by no person
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path}: {image.source} can't be referenced by a DICOM-SR ({type(error).__name__}: {error})"
        ) from error
    with appearing(path) as partial:
        document.save_as(partial, enforce_file_format=True)


def _content(groups: Sequence[Any], algorithm: Algorithm) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    device = hd.sr.DeviceObserverIdentifyingAttributes(
        # One device for all reports of a bundle.
        uid=generate_uid(entropy_srcs=["medray", algorithm.name, algorithm.version]),
        name=algorithm.name[:_LONGEST] or "medray",
        manufacturer_name="medray",
        model_name=f"medray {__version__}",
    )
    return hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
        ),
        procedure_reported=hd.sr.CodedConcept("ANALYSIS", _SCHEME, "Image analysis"),
        imaging_measurements=list(groups),
        title=codes.DCM.ImagingMeasurementReport,
    )


def _likely(name: str, probability: float, decided: bool, algorithm: Algorithm) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    decision = hd.sr.QualitativeEvaluation(
        hd.sr.CodedConcept("DECISION", _SCHEME, "Decision"), codes.SCT.Present if decided else codes.SCT.Absent
    )
    return _group(name, "Probability", probability, algorithm, evaluations=[decision])


def _volume(name: str, millilitres: float, algorithm: Algorithm) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    unit = hd.sr.CodedConcept("ml", "UCUM", "milliliter")
    return _group(name, codes.SCT.Volume, millilitres, algorithm, unit=unit)


def _group(
    name: str,
    what: Any,
    value: float,
    algorithm: Algorithm,
    *,
    unit: Any = None,
    evaluations: Sequence[Any] = (),
) -> Any:
    """One finding with its figure; class names are the data set's own words, under a private coding scheme."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    concept = hd.sr.CodedConcept(what.upper()[:16].split(" ")[0], _SCHEME, what) if isinstance(what, str) else what
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier=name[:_LONGEST]),
        finding_type=class_code(name),
        algorithm_id=hd.sr.AlgorithmIdentification(
            name=algorithm.name or "medray",
            version=algorithm.version or __version__,
            parameters=[algorithm.note or "-"],
        ),
        measurements=[hd.sr.Measurement(concept, float(value), unit if unit is not None else codes.UCUM.NoUnits)],
        qualitative_evaluations=list(evaluations) or None,
    )
