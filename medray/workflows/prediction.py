"""Answer images with a bundle: ``medray predict``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medray.bundle.read import Bundle, Prediction, RuntimeChoice, Selection
from medray.bundle.spec import BundleSpec
from medray.data.image import Image
from medray.data.manifest import Case
from medray.data.readers import read_case
from medray.data.writers import dicom_seg, nifti, picture
from medray.data.writers.atomic import appearing
from medray.errors import MedrayError
from medray.predict.predictor import Precision
from medray.workflows.inputs import Input, expand

Progress = Callable[[int, int, str], None]
"""(images done, images in all, the name of the last one)"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one input.

    Attributes:
        image: its reference(s).
        output: the file written; None where it failed.
        classes: the decision (classification), or the foreground classes found (segmentation).
        probabilities: by class, calibrated (classification).
        seconds: of reading and preparing, network, finishing and writing.
        error: why there is no answer; None where there is one.
    """

    image: str
    output: str | None = None
    classes: tuple[str, ...] = ()
    probabilities: dict[str, float] | None = None
    seconds: dict[str, float] | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """All answers of one call; ``exit_code`` is 1 where any image failed.

    Attributes:
        runtime: the engine that answered, and its precision.
        selection: why it was that one.
    """

    bundle: str
    runtime: str
    selection: Selection
    intended_use: str
    directory: Path
    answers: tuple[Answer, ...]

    @property
    def failed(self) -> tuple[Answer, ...]:
        """Those without an answer."""
        return tuple(answer for answer in self.answers if answer.error is not None)

    @property
    def exit_code(self) -> int:
        """For the shell."""
        return 1 if self.failed else 0


def predict_files(
    bundle_dir: Path | str,
    inputs: Sequence[str | Path],
    out_dir: Path,
    runtime: RuntimeChoice = "torch",
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    precision: Precision | None = None,
    threads: int | None = None,
    overlays: bool = False,
    progress: Progress | None = None,
) -> PredictionSummary:
    """Answer every image; one that can't be read doesn't stop the rest.

    Segmentation writes, for each input, ``NAME_seg`` as .nii.gz (NIfTI in), .dcm (DICOM in) or .png (pictures in), each
    in the input's own geometry. Classification writes one ``predictions.csv``. ``summary.json`` tells of all.

    Args:
        bundle_dir: of the bundle.
        inputs: files, folders, globs, or references as readers take them.
        out_dir: is made; files of the same names are replaced.
        runtime: torch, onnx, openvino or tensorrt; auto for the fastest here. It reproduces the golden outputs before
            the first answer.
        device: cpu or cuda.
        precision: of the arithmetic; None for the bundle's own, and with auto for any.
        threads: ONNX Runtime's and OpenVINO's; None for all usable CPUs.
        overlays: beside each PNG mask of a picture, the picture with the mask drawn on it.
        progress: called after each image.

    Raises:
        BundleError: the bundle can't be used here at all.
        DataError: there is no image at all.
    """
    bundle = Bundle.open(bundle_dir)
    spec = bundle.spec
    listed = expand(
        [str(item) for item in inputs], ndim=spec.ndim, channels=spec.channels, columns=spec.preprocess.columns
    )
    predictor = bundle.predictor(runtime, device=device, precision=precision, threads=threads)
    selection = bundle.select(runtime, device=device, precision=precision, threads=threads)
    out_dir.mkdir(parents=True, exist_ok=True)
    answers = []
    for count, item in enumerate(listed, start=1):
        shown = " + ".join(item.references)
        try:
            image = _read(item)
            found = bundle.predict(image, predictor)
            answers.append(_write(bundle.spec, item, image, found, out_dir, overlays))
        except MedrayError as error:
            answers.append(Answer(image=shown, error=str(error)))
        except Exception as error:  # a defect met by one image must not cost the answers of a night's run
            answers.append(Answer(image=shown, error=f"{type(error).__name__}: {error}"))
        if progress is not None:
            progress(count, len(listed), item.name)
    summary = PredictionSummary(
        bundle=bundle.spec.name,
        runtime=f"{predictor.name} {predictor.precision}",
        selection=selection,
        intended_use=bundle.spec.intended_use,
        directory=out_dir,
        answers=tuple(answers),
    )
    write_summary(summary, bundle.spec.classes, table=not bundle.spec.task.dense)
    return summary


def write_summary(summary: PredictionSummary, classes: Sequence[str], *, table: bool) -> None:
    """Write ``summary.json``, and with ``table`` ``predictions.csv``, into the answers' folder."""
    if table:
        _write_table(summary, classes)
    with appearing(summary.directory / "summary.json") as partial:
        partial.write_text(json.dumps(asdict(summary), indent=1, ensure_ascii=False, default=str), encoding="utf-8")


def _read(item: Input) -> Image:
    image, _, _ = read_case(Case(id=item.name, images=item.references), Path())
    return image


def _write(spec: BundleSpec, item: Input, image: Image, found: Prediction, out_dir: Path, overlays: bool) -> Answer:
    shown = " + ".join(item.references)
    if found.labels is None:
        assert found.probabilities is not None
        return Answer(
            image=shown,
            output="predictions.csv",
            classes=tuple(spec.classes[index] for index in found.decisions),
            probabilities={name: float(p) for name, p in zip(spec.classes, found.probabilities, strict=True)},
            seconds=found.seconds,
        )
    target = out_dir / f"{item.name}_seg"
    kind = image.original.get("format")
    if kind == "dicom":
        path = target.with_name(target.name + ".dcm")
        algorithm = dicom_seg.Algorithm(name=spec.name, version=spec.versions.get("medray", ""), note=spec.intended_use)
        dicom_seg.write_segmentation(path, found.labels, image, classes=spec.classes, algorithm=algorithm)
    elif kind == "nifti" or image.ndim == 3:
        path = target.with_name(target.name + ".nii.gz")
        nifti.write_labels(path, found.labels, image, note=spec.intended_use)
    else:
        path = target.with_name(target.name + ".png")
        picture.write_labels(path, found.labels, note=spec.intended_use)
        if overlays:
            overlay = target.with_name(f"{target.name}_overlay.png")
            picture.write_overlay(overlay, image, found.labels, note=spec.intended_use)
    present = tuple(name for value, name in enumerate(spec.classes) if value and (found.labels == value).any())
    return Answer(image=shown, output=str(path.relative_to(out_dir)), classes=present, seconds=found.seconds)


def _write_table(summary: PredictionSummary, classes: Sequence[str]) -> None:
    """A row for each image: its decision, its probabilities, or why there is none."""
    path = summary.directory / "predictions.csv"
    with appearing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prediction", *(f"p_{name}" for name in classes), "error", "intended_use"])
        for answer in summary.answers:
            row: list[Any] = [answer.image, ";".join(answer.classes)]
            given = answer.probabilities or {}
            row += [f"{given[name]:.6f}" if name in given else "" for name in classes]
            writer.writerow([*row, answer.error or "", summary.intended_use])
