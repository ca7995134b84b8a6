"""What the layouts share: a draft of the manifest, names of files and splits, and the last step to a Manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medray.data.image import Modality
from medray.data.manifest import IGNORE, Case, Finding, Manifest, Split
from medray.data.readers import probe, read_mask
from medray.data.sweep import Progress, sweep
from medray.errors import DataError
from medray.tasks.catalogue import named_for
from medray.tasks.task import Form

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
VOLUMES = (".nii.gz", ".nii")
DICOMS = (".dcm", ".dicom", ".ima")
SUFFIXES = PICTURES + VOLUMES + DICOMS

_SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(kw_only=True)
class Draft:
    """A manifest in the making. ``ndim``, ``channels`` and an unknown modality are taken from the first readable image;
    ``classes`` of None from the labels that the masks hold."""

    root: Path
    task: str
    classes: tuple[str, ...] | None
    cases: list[Case]
    modality: Modality = "other"
    columns: tuple[str, ...] = ()
    findings: list[Finding] = field(default_factory=list)


def split_of(name: str) -> Split | None:
    """The split that a folder or table value is named for; None for any other name."""
    return _SPLITS.get(name.strip().lower())


def suffix_of(path: Path) -> str:
    """The suffix of a path if it is that of a known image format (``.nii.gz`` whole), else the empty string."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """The name without the suffix of a known format."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.name


def visible(folder: Path) -> list[Path]:
    """The entries of a folder in the order of their names, hidden ones and archives' litter left out."""
    try:
        entries = sorted(folder.iterdir(), key=lambda p: natural(p.name))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}. Give a folder that can be read") from None
    return [p for p in entries if not p.name.startswith((".", "__MACOSX", "Thumbs.db"))]


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder."""
    return [p for p in visible(folder) if p.is_dir()]


def images_under(folder: Path) -> Iterator[Path]:
    """All files of known image suffixes below ``folder``, in order; links to folders are not followed."""
    for entry in visible(folder):
        if entry.is_dir() and not entry.is_symlink():
            yield from images_under(entry)
        elif suffix_of(entry) and entry.is_file():
            yield entry


def natural(text: str) -> list[Any]:
    """Sort key under which case 2 stands before case 10."""
    parts = re.split(r"([0-9]{1,18})", text)
    return [(0, int(part), "") if k % 2 else (1, 0, part.lower()) for k, part in enumerate(parts) if part]


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; False too for what can't be a path, such as one that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def relative(path: Path, root: Path) -> str:
    """POSIX path relative to the root where it lies below it, absolute otherwise."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def unique_ids(wanted: Iterable[tuple[str, str]]) -> list[str]:
    """One id a case from (short name, long name): the short ones if no two are alike, else the long ones.

    Long ones that are still alike get a number. Slashes become double underscores, so that an id can name a file.
    """
    pairs = list(wanted)
    for column in (0, 1):
        names = [pair[column].strip("/").replace("/", "__") for pair in pairs]
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{name or 'case'}-{number}" for number, name in enumerate(names)]


def read_json(path: Path) -> Any:
    """Parse a small JSON file.

    Raises:
        DataError: it can't be read or is no JSON.
    """
    try:
        if path.stat().st_size > 64 << 20:
            raise DataError(f"{path}: {path.stat().st_size >> 20} MB is no description of a data set (at most 64 MB)")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no JSON ({error}). Correct the file") from None


def named_classes(folder: Path) -> tuple[str, ...] | None:
    """Class names from a folder's ``classes.json``: a list, ``{name: number}`` or ``{number: name}``; else None."""
    path = folder / "classes.json"
    if not path.is_file():
        return None
    content = read_json(path)
    if isinstance(content, dict):
        return numbered_names(content, path)
    names = tuple(str(name) for name in content) if isinstance(content, list) else ()
    if not names or len(set(names)) != len(names):
        raise DataError(f'{path}: must be a list of different class names, such as ["background", "lesion"]')
    return names


def numbered_names(labels: dict[str, Any], path: Path) -> tuple[str, ...]:
    """``{"lesion": 1}`` or ``{"1": "lesion"}`` to names by number; numbers that are left out become ``label_N``.

    Raises:
        DataError: no such mapping; regions (lists of numbers); an ignore label; more than 254 classes.
    """
    pairs: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise DataError(f"{path}: label {key!r} is a region {value}; give each label one number and regions none")
        name, number = (value, key) if _is_label(key) and not _is_label(value) else (key, value)
        if not _is_label(number) or int(number) in pairs:
            raise DataError(
                f"{path}: label {key!r}: {value!r} must map a name to a number of its own, such as 'lesion': 1"
            )
        if str(name).lower() == "ignore":
            raise DataError(f"{path}: label 'ignore' is {number}; write {IGNORE} in the masks instead and drop it here")
        pairs[int(number)] = str(name)
    if not pairs or max(pairs) >= IGNORE:
        raise DataError(f"{path}: labels must be numbered from 0 to at most {IGNORE - 1}; found {sorted(pairs)[-3:]}")
    names = tuple(pairs.get(n, "background" if n == 0 else f"label_{n}") for n in range(max(pairs) + 1))
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two labels have the same name: {names}. Name each differently")
    return names


def _is_label(value: Any) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", str(value)) is not None


def by_name(labels: list[str]) -> tuple[str, ...]:
    """Class names in order: by number if all are numbers, else by name."""
    return tuple(sorted(set(labels), key=natural))


def ask_task(task: str, form: Form, where: str) -> str:
    """The task that was asked for; of ``auto`` the one that targets of this form mean where nothing is said.

    Raises:
        DataError: the layout holds targets of another form.
    """
    fitting = named_for(form)
    if task == "auto":
        return fitting[0]
    if task in fitting:
        return task
    names = " or ".join(fitting)
    raise DataError(
        f"{where}: this layout holds targets for {names}, but task.kind={task}. Set task.kind=auto or {names}"
    )


def finish(draft: Draft, source: str, progress: Progress | None) -> Manifest:
    """Fill in what only the images tell.

    Raises:
        DataError: no cases, or not one image can be read.
    """
    if not draft.cases:
        raise DataError(f"{source}: no cases found. See `medray check --help` for the layouts that are understood")
    root = draft.root
    first: DataError | None = None
    header = None
    for case in draft.cases:
        try:
            headers = [probe(reference, root) for reference in case.images]
        except DataError as error:
            first = first or error
            continue
        header = headers[0]
        channels = sum(h.channels for h in headers)
        break
    if header is None:
        raise DataError(f"{source}: none of {len(draft.cases)} images can be read; the first: {first}")
    if len(header.shape) not in (2, 3):
        raise DataError(f"{source}: images have {len(header.shape)} spatial axes; 2 and 3 are supported")
    return Manifest(
        source=source,
        root=str(root),
        task=draft.task,
        ndim=3 if len(header.shape) == 3 else 2,
        channels=channels,
        classes=draft.classes if draft.classes is not None else _classes_in_masks(draft, progress),
        modality=draft.modality if draft.modality != "other" else header.modality,
        columns=draft.columns,
        cases=tuple(draft.cases),
        findings=tuple(draft.findings),
    )


def _classes_in_masks(draft: Draft, progress: Progress | None) -> tuple[str, ...]:
    """All labels that the masks hold, numbered; needs every mask once, since a rare label counts too."""
    import numpy as np

    def highest(case: Case) -> int:
        if case.mask is None:
            return 0
        try:
            values = np.unique(read_mask(case.mask, draft.root).array)
        except DataError:
            return 0  # the checks name it
        values = values[values != IGNORE]
        return int(values.max()) if len(values) else 0

    masked = [case for case in draft.cases if case.mask is not None]
    top = 0
    for case, value in zip(masked, sweep(highest, masked, progress, name=lambda c: c.id), strict=True):
        if value >= IGNORE:
            raise DataError(
                f"{case.mask}: holds label {value}; numbers of single objects are no classes (0 to {IGNORE - 1}). "
                "Write masks with one number per class"
            )
        top = max(top, value)
    if top == 0:
        raise DataError(f"{draft.root}: no mask holds a label above 0. Mark something, or correct the masks")
    return ("background", "foreground") if top == 1 else ("background", *(f"label_{n}" for n in range(1, top + 1)))
