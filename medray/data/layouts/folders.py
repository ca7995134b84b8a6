"""Folders: one per class, or images/ beside masks/; either under train/, val/, test/ or not."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from medray.data.layouts.base import (
    DICOMS,
    Draft,
    ask_task,
    images_under,
    named_classes,
    natural,
    relative,
    split_of,
    stem_of,
    subfolders,
    suffix_of,
    unique_ids,
)
from medray.data.layouts.dicom import holds_dicom, series_under
from medray.data.manifest import Case, Finding, Split
from medray.data.sweep import Progress
from medray.errors import DataError
from medray.tasks.catalogue import find_task

_IMAGES = ("images", "image", "imgs", "img")
_MASKS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "segmentations",
    "segmentation",
    "gt",
    "1st_manual",
    "manual",
)
_VALID = ("valid", "fov", "roi")
_WORDS = "masks?|seg|segmentation|labels?|gt|annotation|manual\\d?|image|img|fov|roi|valid|training|test"


def _sides(folder: Path) -> list[tuple[Split | None, Path]]:
    """(split, folder): the folders named for splits, training first, or the folder itself where there are none."""
    named = [(split_of(p.name), p) for p in subfolders(folder)]
    sides: list[tuple[Split | None, Path]] = [
        (split, p) for wanted in ("train", "val", "test") for split, p in named if split == wanted
    ]
    return sides if sides and sides[0][0] == "train" else [(None, folder)]


def _child(folder: Path, names: tuple[str, ...], meaning: str) -> Path | None:
    found = [p for p in subfolders(folder) if p.name.lower() in names]
    if len(found) > 1:
        listed = " and ".join(p.name for p in found)
        raise DataError(
            f"{folder}: {listed} could both hold the {meaning}. Name the files in a table (columns image, mask, valid)"
        )
    return found[0] if found else None


def has_pairs(folder: Path) -> bool:
    """Whether the folder (or its train/) has images/ and a folder of masks."""
    first = _sides(folder)[0][1]
    names = {p.name.lower() for p in subfolders(first)}
    return bool(names & set(_IMAGES)) and bool(names & set(_MASKS))


def _key(path: Path, folder: Path) -> str:
    """What an image and its mask share: the path below their folder without ending and words such as _mask."""
    stem = re.sub(rf"[_\-. ](?:{_WORDS})$", "", stem_of(path), flags=re.IGNORECASE)
    return (path.parent.relative_to(folder) / stem).as_posix()


def _by_key(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    keys: dict[str, Path] = {}
    for path in images_under(folder):
        key = _key(path, folder)
        if key in keys:
            raise DataError(
                f"{folder}: {keys[key].name} and {path.name} both belong to {key!r}. Name the files in a table instead"
            )
        keys[key] = path
    return keys


def draft_pairs(source: str, path: Path, task: str) -> Draft:
    """images/ and masks/ (matched by stem), optionally valid/ with regions of interest; classes.json names the labels.

    Raises:
        DataError: no image has a mask, or two files belong to one name.
    """
    kind = ask_task(task, "mask", source)
    root = path.resolve()
    found: list[tuple[str, Split | None, Path, Path | None, Path | None]] = []
    findings: list[Finding] = []
    for split, side in _sides(root):
        folder = _child(side, _IMAGES, "images")
        masks, valid = _by_key(_child(side, _MASKS, "masks")), _by_key(_child(side, _VALID, "regions of interest"))
        for key, image in _by_key(folder).items():
            inner = split_of(Path(key).parts[0]) if split is None and "/" in key else None
            found.append((key, split or inner, image, masks.pop(key, None), valid.get(key)))
        for mask in masks.values():
            text = f"{relative(mask, root)}: a mask without an image"
            fix = "give both the same name before the ending, or delete the mask"
            findings.append(Finding(rule="unpaired", severity="warning", case=None, message=text, fix=fix))
    if not any(mask for *_, mask, _ in found):
        raise DataError(
            f"{source}: no image has a mask of its name. Name them alike (scan1.png, scan1_mask.png), or write a table"
        )
    ids = unique_ids((Path(key).name, f"{split or ''}/{key}") for key, split, *_ in found)
    cases = [
        Case(
            id=ids[k],
            images=(relative(image, root),),
            mask=relative(mask, root) if mask else None,
            valid=relative(valid, root) if valid else None,
            split=split,
        )
        for k, (_, split, image, mask, valid) in enumerate(found)
    ]
    return Draft(root=root, task=kind, classes=named_classes(root), cases=cases, findings=findings)


def has_classes(folder: Path) -> bool:
    """Whether the folder (or its train/) has two or more folders with images."""
    classes = subfolders(_sides(folder)[0][1])
    return sum(1 for p in classes if next(images_under(p), None) is not None or holds_dicom(p)) >= 2


def draft_classes(source: str, path: Path, task: str, progress: Progress | None) -> Draft:
    """A folder per class, its name the class's; below it pictures, volumes or DICOM series at any depth.

    Raises:
        DataError: a split holds a class that training does not.
    """
    kind = ask_task(task, "class", source)
    root = path.resolve()
    units: dict[tuple[Split | None, str], list[tuple[str, str]]] = defaultdict(list)
    for split, side in _sides(root):
        for folder in subfolders(side):
            files = [p for p in images_under(folder) if suffix_of(p) not in DICOMS]
            units[split, folder.name] += [(relative(p, root), "") for p in files]
            if holds_dicom(folder):
                units[split, folder.name] += [(s.reference(root), s.patient) for s in series_under(folder, progress)]
    given = named_classes(root)
    shown = sorted({name for (_, name), found in units.items() if found}, key=natural)
    classes = find_task(kind).arrange(shown, given, source)
    unknown = sorted({name for _, name in units} - set(classes))
    if given and unknown:
        raise DataError(
            f"{root}: folder {unknown[0]!r} is not in classes.json ({', '.join(classes)}). Correct one of them"
        )
    flat = [(split, name, ref, patient) for (split, name), found in units.items() for ref, patient in found]
    ids = unique_ids((stem_of(Path(ref)), Path(ref).with_name(stem_of(Path(ref))).as_posix()) for _, _, ref, _ in flat)
    cases = [
        Case(id=ids[k], images=(ref,), label=classes.index(name), split=split, patient=patient)
        for k, (split, name, ref, patient) in enumerate(flat)
    ]
    return Draft(root=root, task=kind, classes=classes, cases=cases)
