"""What a person names on the command line (files, folders, globs, references) to a list of images to answer."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medray.data.layouts.dicom import series_under
from medray.data.rows import reference as reference_of
from medray.data.tablefile import is_table, read_table
from medray.errors import DataError

SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".dcm")
_CHANNEL = re.compile(r"^(?P<stem>.+)_(?P<channel>\d{4})$")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One image to answer.

    Attributes:
        references: a file, a DICOM series' folder, or any reference that a reader takes; one for each channel's file.
        name: relative path without suffix, that the answer is named after; different for all inputs.
    """

    references: tuple[str, ...]
    name: str


def expand(inputs: Sequence[str], *, ndim: int, channels: int, columns: Sequence[str] | None = None) -> list[Input]:
    """List the images behind ``inputs``, in a stable order.

    Folders are searched with all below them. In 3-D a folder's DICOM files are one series; in 2-D each is an image.
    Where the bundle wants several channels, files ``NAME_0000``, ``NAME_0001``, … (nnU-Net's layout) are one image.

    Args:
        inputs: as they were named.
        ndim, channels: of the bundle.
        columns: of a bundle that reads tables: each row of each table is an image.

    Raises:
        DataError: an input that isn't there, or nothing readable in all of them.
    """
    if columns:
        return _rows(inputs, columns)
    found: list[tuple[str, str]] = []
    for text in inputs:
        found += _one(text, ndim)
    if not found:
        raise DataError(
            f"no image in {', '.join(inputs) or 'no input'}. Give NIfTI, DICOM or picture files, "
            "folders of them, or a glob"
        )
    grouped = _group(found, channels) if channels > 1 else [((reference,), name) for reference, name in found]
    taken: set[str] = set()
    result = []
    for references, name in grouped:
        unique, number = name, 2
        while unique.casefold() in taken:
            unique, number = f"{name}-{number}", number + 1
        taken.add(unique.casefold())
        result.append(Input(references=references, name=unique))
    return result


def _rows(inputs: Sequence[str], columns: Sequence[str]) -> list[Input]:
    found = []
    for text in inputs:
        path = Path(text)
        if not path.is_file() or not is_table(path):
            raise DataError(f"{text}: no table. This bundle reads rows of tables (.csv, .tsv, .parquet)")
        for number, row in enumerate(read_table(path)):
            name = row.get("id") or f"row-{number + 1}"
            found.append(Input(references=(reference_of(text, number, columns),), name=name))
    if not found:
        raise DataError(f"no row in {', '.join(inputs)}")
    return found


def _one(text: str, ndim: int) -> list[tuple[str, str]]:
    path = Path(text)
    if path.is_dir():
        return _folder(path, ndim)
    if path.is_file():
        return [(text, _stem(path.name))]
    if "://" in text or "#" in text:
        return [(text, re.sub(r"[^A-Za-z0-9._-]+", "_", text.split("://")[-1]).strip("._") or "image")]
    matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 (an absolute pattern is fine here)
    if not matches:
        raise DataError(f"{text}: no such file or folder, and no file matches it as a pattern")
    return [item for match in matches for item in (_one(match, ndim) if Path(match).exists() else [])]


def _folder(root: Path, ndim: int) -> list[tuple[str, str]]:
    """(reference, name) of each image below a folder."""
    found: list[tuple[str, str]] = []
    dicom: set[Path] = set()
    for series in series_under(root):
        dicom |= set(series.files)
        if ndim == 2 or len(series.files) == 1:
            found += [(str(file), _relative(file, root)) for file in series.files]
        else:
            name = series.folder.relative_to(root).as_posix().removeprefix(".") or root.resolve().name or "series"
            found.append(
                (str(series.folder), name)
                if series.alone
                else (f"{series.folder}#{series.uid}", f"{name}-{series.uid}")
            )
    for file in sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p, root)):
        wanted = file.name.lower().endswith(SUFFIXES) and file not in dicom
        if wanted and (file.suffix.lower() != ".dcm" or not _sound_dicom(file)):
            found.append((str(file), _relative(file, root)))
    return sorted(found, key=lambda item: item[1])


def _sound_dicom(path: Path) -> bool:
    """Whether it is DICOM but no image (a report, a segmentation). A damaged file is not: it shall be seen to fail."""
    import pydicom

    try:
        return bool(pydicom.dcmread(path, stop_before_pixels=True).get("SOPClassUID"))
    except Exception:
        return False


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).with_name(_stem(file.name)).as_posix()


def _group(found: Iterable[tuple[str, str]], channels: int) -> list[tuple[tuple[str, ...], str]]:
    """Join files of one image's channels; files without a channel number stay single (a colour picture has all)."""
    groups: dict[str, list[tuple[int, str]]] = {}
    single: list[tuple[tuple[str, ...], str]] = []
    for reference, name in found:
        match = _CHANNEL.match(name)
        if match and int(match["channel"]) < channels:
            groups.setdefault(match["stem"], []).append((int(match["channel"]), reference))
        else:
            single.append(((reference,), name))
    return single + [(tuple(reference for _, reference in sorted(parts)), stem) for stem, parts in groups.items()]


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _stem(name: str) -> str:
    lower = name.lower()
    for suffix in SUFFIXES:
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name
