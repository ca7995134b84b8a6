"""A DICOM tree: series are found by their headers, whatever the files are called.

A series that fills a folder is that folder, one that shares it ``FOLDER#SERIES-UID``, one of a single file that file.
Labels come from a table in the tree's root that names a series by path or SeriesInstanceUID (column ``image``) or all
series of a person (column ``patient`` alone), or from a folder per class (see :mod:`medray.data.layouts.folders`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.data.layouts.base import (
    DICOMS,
    Draft,
    ask_task,
    by_name,
    exists,
    named_classes,
    relative,
    split_of,
    suffix_of,
    unique_ids,
    visible,
)
from medray.data.manifest import Case
from medray.data.sweep import Progress, sweep
from medray.data.tablefile import columns, is_table, read_table, whole_number
from medray.errors import DataError, MissingDependencyError
from medray.tasks.catalogue import find_task

_NO_IMAGES = {"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "DOC", "FID"}


@dataclass(frozen=True)
class Series:
    """Files of one SeriesInstanceUID in one folder; ``alone`` says that the folder holds no other images."""

    uid: str
    patient: str
    folder: Path
    files: tuple[Path, ...]
    alone: bool

    def reference(self, root: Path) -> str:
        """What a Case names it by."""
        if len(self.files) == 1:
            return relative(self.files[0], root)
        return relative(self.folder, root) + ("" if self.alone else f"#{self.uid}")


def _candidates(folder: Path) -> Iterator[Path]:
    for entry in visible(folder):
        if entry.is_dir() and not entry.is_symlink():
            yield from _candidates(entry)
        elif entry.name != "DICOMDIR" and entry.is_file() and _is_dicom(entry):
            yield entry


def _is_dicom(path: Path) -> bool:
    """By its ending, or by the mark behind the preamble where there is none that means something else."""
    if path.name.lower().endswith(DICOMS):
        return True
    if (
        suffix_of(path)
        or is_table(path)
        or path.suffix.lower() in (".txt", ".json", ".xml", ".md", ".pdf", ".zip", ".gz")
    ):
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether there is a DICOM file somewhere below."""
    return next(_candidates(folder), None) is not None


def series_under(folder: Path, progress: Progress | None = None) -> list[Series]:
    """All image series below a folder, by path. Files without pixels or that can't be parsed are left out.

    Raises:
        MissingDependencyError: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise MissingDependencyError("pydicom", "reading DICOM", "pip install 'pydicom>=3,<4'") from None

    tags = ["SeriesInstanceUID", "PatientID", "Modality", "Rows", "Columns"]

    def header(path: Path) -> tuple[str, str] | None:
        try:
            found: Any = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags, force=True)
            if not found.get("Rows") or not found.get("Columns") or found.get("Modality", "") in _NO_IMAGES:
                return None
            return str(found.get("SeriesInstanceUID") or path.name), str(found.get("PatientID") or "").strip()
        except Exception:  # pydicom raises whatever a damaged header leads it to; such a file belongs to no series
            return None

    files = list(_candidates(folder))
    groups: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    patients: dict[tuple[Path, str], str] = {}
    for path, found in zip(files, sweep(header, files, progress, name=lambda p: p.name), strict=True):
        if found is not None:
            key = path.parent, found[0]
            groups[key].append(path)
            patients.setdefault(key, found[1])
    shared: dict[Path, int] = defaultdict(int)
    for parent, _ in groups:
        shared[parent] += 1
    return [
        Series(uid=uid, patient=patients[parent, uid], folder=parent, files=tuple(members), alone=shared[parent] == 1)
        for (parent, uid), members in groups.items()
    ]


def patient_table(folder: Path) -> Path | None:
    """The one table in a DICOM tree's root that has ``label`` for each ``patient`` and no ``image``."""
    fitting = []
    for path in visible(folder):
        if path.is_file() and is_table(path):
            names = set(columns(path))
            if {"patient", "label"} <= names and "image" not in names:
                fitting.append(path)
    if len(fitting) > 1:
        raise DataError(f"{folder}: {' and '.join(p.name for p in fitting)} both label patients. Keep one")
    return fitting[0] if fitting else None


def resolve_series(draft: Draft, progress: Progress | None) -> Draft:
    """Find the series that a table names by SeriesInstanceUID, and the patients that it leaves to the headers.

    The tree is only searched where a row names no plain picture or volume.
    """
    root = draft.root

    def needs(reference: str) -> bool:
        if "://" in reference or ".npz#" in reference:
            return False
        path = root / reference
        return not exists(path) or path.is_dir() or (_is_dicom(path) and suffix_of(path) in ("", *DICOMS))

    if not any(needs(reference) for case in draft.cases for reference in case.images):
        return draft
    series = {s.uid: s for s in series_under(root, progress)}
    by_reference = {s.reference(root): s for s in series.values()}
    cases = []
    for case in draft.cases:
        found = [series.get(i) or by_reference.get(i.rstrip("/")) for i in case.images]
        images = tuple(s.reference(root) if s else i for s, i in zip(found, case.images, strict=True))
        patient = case.patient or next((s.patient for s in found if s), "")
        cases.append(case.model_copy(update={"images": images, "patient": patient}))
    draft.cases = cases
    return draft


def draft_patients(source: str, folder: Path, table: Path, task: str, progress: Progress | None) -> Draft:
    """Every series of a patient gets the patient's label.

    Raises:
        DataError: no patient of the table is in the tree, one stands twice, or the labels are none.
    """
    rows = {}
    for row in read_table(table):
        if row["patient"] in rows:
            raise DataError(
                f"{table}: patient {row['patient']!r} stands twice. Keep one row, or label series (column image)"
            )
        rows[row["patient"]] = row
    kind = ask_task(task, "class", source)
    root = folder.resolve()
    found = [s for s in series_under(root, progress) if s.patient in rows]
    if not found:
        raise DataError(
            f"{table}: none of its {len(rows)} patients is a PatientID in {folder}. Correct the column 'patient'"
        )
    labels = {patient: whole_number(row["label"]) for patient, row in rows.items()}
    names = by_name([labels[s.patient] for s in found if labels[s.patient]])
    classes = find_task(kind).arrange(names, named_classes(root), str(table))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise DataError(
            f"{table}: label {unknown[0]!r} is not in classes.json ({', '.join(classes)}). Correct one of them"
        )
    ids = unique_ids((s.folder.name, s.reference(root)) for s in found)
    cases = [
        Case(
            id=ids[k],
            images=(s.reference(root),),
            label=classes.index(labels[s.patient]) if labels[s.patient] else None,
            patient=s.patient,
            site=rows[s.patient].get("site") or None,
            split=split_of(rows[s.patient].get("split", "")),
        )
        for k, s in enumerate(found)
    ]
    return Draft(root=root, task=kind, classes=classes, cases=cases)
