"""What a client gets: JSON, a mask, a picture or a DICOM object, each in the input's own geometry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medray.bundle.read import Bundle, Prediction
from medray.data.fingerprint import Fingerprint
from medray.data.image import Image
from medray.data.writers import dicom_seg, dicom_sr, nifti, picture
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import DataError
from medray.learn.metrics import entropy
from medray.predict.predictor import Floats
from medray.tasks.catalogue import find_task

Form = Literal["json", "nifti", "png", "dicom", "sr"]
MEDIA: dict[Form, str] = {
    "json": "application/json",
    "nifti": "application/nifti",
    "png": "image/png",
    "dicom": "application/dicom",
    "sr": "application/dicom",
}
_ALIASES: dict[str, Form] = {
    "application/json": "json",
    "application/*": "json",
    "*/*": "json",
    "application/nifti": "nifti",
    "application/x-nifti": "nifti",
    "application/vnd.nifti": "nifti",
    "application/gzip": "nifti",
    "image/png": "png",
    "image/*": "png",
    "application/dicom": "dicom",
}
PROBABILITY_BYTES = 2**28
"""Segmentations whose probabilities take more than that get no uncertainty: it would cost more than the answer."""
_UNUSUAL = 2.0  # times beyond the training data's range
_OUTSIDE = 0.25  # share of values beyond the training data's central 99 %


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Something about the input that a reader of the answer has to know."""

    flag: str
    message: str


def choose(accept: str | None, kind: str) -> Form:
    """What the client wants most of what there is.

    Raises:
        RefusedError: 406, nothing of it.
    """
    offered: tuple[Form, ...] = ("json", "nifti", "png", "dicom", "sr") if find_task(kind).dense else ("json", "sr")
    return _best(accept, offered, offered[0], kind)


def choose_map(accept: str | None) -> Form:
    """Of an explanation: a picture, or the map on the scan's own grid.

    Raises:
        RefusedError: 406, neither.
    """
    return _best(accept, ("png", "nifti"), "png", "an explanation")


def _best(accept: str | None, offered: tuple[Form, ...], default: Form, what: str) -> Form:
    best: tuple[float, Form] | None = None
    for item in (accept or "*/*")[:1000].split(","):
        media, *parameters = (part.strip().lower() for part in item.split(";"))
        form = default if media in ("*/*", "application/*") and default == "png" else _ALIASES.get(media)
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                weight = _number(parameter[2:])
            elif parameter == "object=sr" and form == "dicom":
                form = "sr"
        if form == "dicom" and form not in offered:
            form = "sr"  # a classification has no mask, so there is one object that can be meant
        if form in offered and weight > 0 and (best is None or weight > best[0]):
            best = (weight, form)
    if best is None:
        choices = ", ".join(dict.fromkeys(MEDIA[form] for form in offered))
        raise RefusedError(406, "not-acceptable", f"{what} answers as {choices}; name one of them in Accept")
    return best[1]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 <= value <= 1 else 0.0


def uncertainty(found: Prediction, kind: str) -> float | None:
    """From 0, certain, to 1: as the task has it; of masks the mean entropy over the voxels found."""
    p, task = found.probabilities, find_task(kind)
    if p is None:
        return None
    if not task.dense:
        return task.uncertainty(p)
    spread = entropy(p)
    inside = found.labels > 0 if found.labels is not None else np.zeros(spread.shape, bool)
    return float(spread[inside].mean() if inside.any() else spread.mean())


def flags(bundle: Bundle, fingerprint: Fingerprint | None, image: Image, labels: Any = None) -> list[Flag]:
    """How the input differs from what the model was trained on, as far as the bundle knows."""
    spec, found = bundle.spec, []
    if "other" not in (image.modality, spec.modality) and image.modality != spec.modality:
        found.append(Flag(flag="wrong-modality", message=f"the image is {image.modality}, the model's {spec.modality}"))
    if image.original.get("nonfinite"):
        found.append(Flag(flag="not-finite", message="values that were NaN or infinite have been replaced"))
    if fingerprint is None:
        return found
    low, high = fingerprint.spacing_min, fingerprint.spacing_max
    if image.spacing is not None and low is not None and high is not None:
        found += _beyond("unusual-spacing", "mm", image.spacing, low, high)
    found += _beyond("unusual-shape", "voxels", image.shape, fingerprint.shape_min, fingerprint.shape_max)
    share = outside(fingerprint, image, labels)
    if share is not None and share > _OUTSIDE:
        message = f"{share:.0%} of the intensities lie beyond the central 99 % of the training data"
        found.append(Flag(flag="unusual-intensity", message=message))
    if any(flag.flag.startswith("unusual") for flag in found):
        message = "the image differs from all that the model was trained on; its answer has not been measured on such"
        found.append(Flag(flag="out-of-distribution", message=message))
    return found


def _beyond(name: str, unit: str, values: Any, low: Any, high: Any) -> list[Flag]:
    if len(values) != len(low) or all(
        a / _UNUSUAL <= value <= b * _UNUSUAL for value, a, b in zip(values, low, high, strict=True)
    ):
        return []
    text = " × ".join(f"{value:.4g}" for value in values)
    ranges = ", ".join(f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True))
    return [Flag(flag=name, message=f"{text} {unit}; the training data had {ranges}")]


def outside(fingerprint: Fingerprint, image: Image, labels: Any = None) -> float | None:
    """Share of the values beyond the training data's 0.5 and 99.5 percentiles, .01 there by construction.

    Of segmentations the fingerprint knows the foreground alone: the voxels that were found are held against it.
    """
    if len(fingerprint.intensity) != len(image.array):
        return None
    values = image.array.reshape(len(image.array), -1)
    if labels is not None:
        values = image.array[:, labels > 0]
    if not values.size:
        return None
    beyond = [(row < known.p005) | (row > known.p995) for row, known in zip(values, fingerprint.intensity, strict=True)]
    return float(np.mean(beyond))


def as_json(
    bundle: Bundle, found: Prediction, image: Image, noted: list[Flag], about: dict[str, Any]
) -> dict[str, Any]:
    """The answer as a document; ``about`` is what is known of model and engine."""
    spec = bundle.spec
    document: dict[str, Any] = {**about, "task": spec.kind, "intended_use": spec.intended_use}
    if found.labels is None:
        assert found.probabilities is not None
        document["classes"] = [spec.classes[index] for index in found.decisions]
        document["probabilities"] = {
            name: round(float(p), 6) for name, p in zip(spec.classes, found.probabilities, strict=True)
        }
    else:
        counts = np.bincount(found.labels.ravel(), minlength=len(spec.classes))
        document["classes"] = [spec.classes[value] for value in range(1, len(spec.classes)) if counts[value]]
        document["voxels"] = {name: int(counts[value]) for value, name in enumerate(spec.classes) if value}
        document["volumes_ml"] = _volumes(spec.classes, counts, image)
    spread = uncertainty(found, spec.kind)
    document["uncertainty"] = None if spread is None else round(spread, 6)
    document["flags"] = [{"flag": flag.flag, "message": flag.message} for flag in noted]
    document["seconds"] = {name: round(value, 6) for name, value in found.seconds.items()}
    return document


def _volumes(classes: Any, counts: Any, image: Image) -> dict[str, float] | None:
    """Millilitres by class; None in 2-D, and where the file states no spacing."""
    if image.ndim != 3 or image.spacing is None:
        return None
    # The determinant, and not the product of the spacings: a sheared grid (a tilted gantry's) has smaller voxels.
    cubic = abs(float(np.linalg.det(image.affine[:3, :3]))) if image.affine is not None else np.prod(image.spacing)
    return {name: round(int(counts[value]) * float(cubic) / 1000, 6) for value, name in enumerate(classes) if value}


def as_file(form: Form, bundle: Bundle, labels: npt.NDArray[Any], image: Image, folder: Path) -> bytes:
    """The mask in the form asked for; written and read again within ``folder``.

    Raises:
        RefusedError: 406, the input can't be answered so.
    """
    spec = bundle.spec
    if form == "dicom":
        if image.original.get("format") != "dicom":
            raise RefusedError(406, "not-acceptable", "a DICOM-SEG refers to a DICOM image, and another kind was sent")
        path = folder / "answer.dcm"
        algorithm = dicom_seg.Algorithm(name=spec.name, version=spec.versions.get("medray", ""), note=spec.intended_use)
        try:
            dicom_seg.write_segmentation(path, labels, image, classes=spec.classes, algorithm=algorithm)
        except DataError as error:
            text = str(error).replace(str(folder), "")
            raise RefusedError(422, "no-segmentation", f"no DICOM-SEG can refer to it: {text}") from error
    elif form == "nifti":
        path = folder / "answer.nii.gz"
        nifti.write_labels(path, labels, image, note=spec.intended_use)
    else:
        path = folder / "answer.png"
        flat, drawn = most_telling(image, labels)
        picture.write_overlay(path, flat, drawn, note=spec.intended_use)
    return path.read_bytes()


def as_report(bundle: Bundle, document: dict[str, Any], image: Image, folder: Path) -> bytes:
    """The figures of an answer, as :func:`as_json` gives them, as a DICOM-SR; written and read again in ``folder``.

    Raises:
        RefusedError: 406, the input can't be answered so.
    """
    if image.original.get("format") != "dicom":
        raise RefusedError(406, "not-acceptable", "a DICOM-SR refers to a DICOM image, and another kind was sent")
    spec, path = bundle.spec, folder / "answer.dcm"
    algorithm = dicom_seg.Algorithm(name=spec.name, version=spec.versions.get("medray", ""), note=spec.intended_use)
    try:
        dicom_sr.write_report(
            path,
            image,
            probabilities=document.get("probabilities"),
            decided=document["classes"],
            volumes_ml=document.get("volumes_ml"),
            uncertainty=document["uncertainty"],
            algorithm=algorithm,
        )
    except DataError as error:
        text = str(error).replace(str(folder), "")
        raise RefusedError(422, "no-report", f"no DICOM-SR can be written: {text}") from error
    return path.read_bytes()


def as_map(form: Form, heat: Floats, image: Image, folder: Path, note: str) -> bytes:
    """An explanation (*s), 0 to 1, as a picture laid over the image, or on its own grid."""
    path = folder / ("answer.nii.gz" if form == "nifti" else "answer.png")
    if form == "nifti":
        nifti.write_map(path, heat, image, note=note)
    else:
        picture.write_heat(path, image, heat, note=note)
    return path.read_bytes()


def most_telling(image: Image, values: npt.NDArray[Any]) -> tuple[Image, npt.NDArray[Any]]:
    """A 2-D image and its values as they are; of a volume, the axial slice where most is found.

    The slice is shown as radiologists do: anterior up, the patient's right on the left.
    """
    if image.ndim == 2:
        return image, values
    depth = int((values > 0).sum(axis=(0, 1)).argmax()) if (values > 0).any() else image.shape[2] // 2
    flat = image.array[..., depth].transpose(0, 2, 1)[:, ::-1, ::-1]
    shown = Image(array=np.ascontiguousarray(flat), spacing=None, modality=image.modality, source=image.source)
    return shown, np.ascontiguousarray(values[..., depth].T[::-1, ::-1])
