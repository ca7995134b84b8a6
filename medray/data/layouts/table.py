"""A table: CSV, TSV or Parquet with a row per case.

Columns: ``image`` (or ``image_*``, a file per channel), and ``label``, or several 0/1 columns ``label_*``, or ``mask``;
optional ``id``, ``valid``, ``patient``, ``site``, ``split``. All other columns are clinical ones. Several findings of
one image stand in ``label`` as ``a|b``. Paths are relative to the table; the ending or ``images/`` may be left out.

``classes.json`` beside it names the classes in their order. Columns of other names are named behind the path:
``cases.csv?image=image_id&label=dx&patient=lesion_id``.

A table without images is learnt from itself where ``columns`` says from which of its columns:
``cases.csv?columns=age,sex,chol&label=dx``, or ``columns=*`` for all that have no other meaning. Numbers that stand for
kinds are marked: ``columns=age,cp:kind``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from medray.data.layouts.base import (
    SUFFIXES,
    Draft,
    by_name,
    exists,
    named_classes,
    relative,
    split_of,
    stem_of,
    unique_ids,
    visible,
)
from medray.data.manifest import Case, Split
from medray.data.rows import Column, columns_of, missing_values, reference
from medray.data.tablefile import Row, cell, columns, is_table, nearest, read_table, whole_number
from medray.errors import DataError
from medray.tasks.catalogue import find_task, named_for
from medray.tasks.task import Task

_KNOWN = ("id", "image", "mask", "valid", "label", "patient", "site", "split")
_FOLDERS = {"image": ("", "images", "image"), "mask": ("", "masks", "labels", "mask"), "valid": ("", "valid", "fov")}


def find_table(folder: Path) -> Path | None:
    """The one table of a folder that describes its cases: it has an ``image``, or ``patient`` and ``label`` columns.

    Raises:
        DataError: there are several.
    """
    tables = [p for p in visible(folder) if p.is_file() and is_table(p)]
    fitting = [p for p in tables if _describes(p)]
    if len(fitting) > 1:
        raise DataError(f"{folder}: {', '.join(p.name for p in fitting)} all list images. Give one of them as data=")
    return fitting[0] if fitting else None


def _describes(path: Path) -> bool:
    try:
        names = set(columns(path))
    except DataError:
        return False
    target = bool(names & {"label", "mask"}) or any(n.startswith("label_") for n in names)
    return target and ("image" in names or any(n.startswith("image_") for n in names))


def split_query(source: str) -> tuple[str, dict[str, str]]:
    """``cases.csv?image=file&label=dx`` to the path and its column names.

    Raises:
        DataError: a name that no column has a meaning for.
    """
    if "?" not in source or exists(Path(source)):
        return source, {}
    path, _, query = source.partition("?")
    naming = dict(parse_qsl(query, keep_blank_values=True))
    for known in naming:
        if known not in (*_KNOWN, "columns"):
            raise DataError(
                f"{source}: {known!r} is no column with a meaning{nearest(known, _KNOWN)}. Use {', '.join(_KNOWN)}"
            )
    return path, naming


def draft_table(path: Path, task: str, naming: dict[str, str] | None = None) -> Draft:
    """The cases of a table.

    Raises:
        DataError: no rows, no column for the image or the target, a split, label or 0/1 value that is none.
    """
    asked = (naming or {}).get("columns")
    rows = read_table(path, {known: own for known, own in (naming or {}).items() if known != "columns"})
    if not rows:
        raise DataError(f"{path}: no rows. Write one per case")
    names = list(rows[0])
    pictures = ["image"] if "image" in names else [n for n in names if n.startswith("image_")]
    if pictures and asked is not None:
        raise DataError(f"{path}: has images and columns=: learning from both at once is not among the tasks. Drop one")
    if not pictures and asked is None:
        hint = f"{path}?image=COLUMN&label=COLUMN, or learn from the table itself by ?columns=*"
        raise DataError(
            f"{path}: no column 'image'. It has: {', '.join(names)}. Name the columns in the file, or as {hint}"
        )
    flags = [n for n in names if n.startswith("label_")]
    kind = _kind(path, names, flags, rows, task)
    form = find_task(kind).target
    classes = named_classes(path.parent)
    used = {*pictures, "id", "valid", "patient", "site", "split"}
    if form == "mask":
        used |= {"mask"}
        labels: list[Any] = [None] * len(rows)
    elif flags:
        used |= {*flags, "label"}
        classes = tuple(n.removeprefix("label_") for n in flags)
        labels = [_flags(path, number, row, flags) for number, row in enumerate(rows, 2)]
    else:
        used |= {"label", "mask"}
        labels, classes = _labels(path, [whole_number(row["label"]) for row in rows], find_task(kind), classes)

    root = path.parent.resolve()
    splits = _splits(path, rows)
    schema: tuple[Column, ...] = ()
    images: list[tuple[str, ...]]
    if asked is not None:
        schema = columns_of(path, rows, asked, [name for name in names if name not in used])
        images = [(reference(path.name, number, schema),) for number in range(len(rows))]
    else:
        images = [tuple(_locate(root, row[c], "image") for c in pictures if row[c]) for row in rows]
    for number, found in enumerate(images, 2):
        if not found:
            raise DataError(f"{path}: row {number} names no image. Fill in {pictures[0]!r}, or delete the row")
    ids = unique_ids(
        (row.get("id") or (f"row-{k + 1}" if schema else stem_of(Path(found[0]))), found[0])
        for k, (row, found) in enumerate(zip(rows, images, strict=True))
    )
    cases = [
        Case(
            id=ids[k],
            images=images[k],
            label=labels[k],
            mask=_locate(root, row["mask"], "mask") if form == "mask" and row["mask"] else None,
            valid=_locate(root, row["valid"], "valid") if row.get("valid") else None,
            patient=row.get("patient", ""),
            site=row.get("site") or None,
            split=splits[k],
            columns={name: cell(row[name]) for name in names if name not in used},
        )
        for k, row in enumerate(rows)
    ]
    draft = Draft(root=root, task=kind, classes=classes, cases=cases)
    if schema:
        draft.modality, draft.columns = "table", tuple(column.text() for column in schema)
        draft.findings += missing_values(rows, schema)
    return draft


def _kind(path: Path, names: list[str], flags: list[str], rows: list[Row], task: str) -> str:
    several = bool(flags) or any("|" in row.get("label", "") for row in rows)
    possible: list[str] = []
    if "mask" in names and any(row["mask"] for row in rows):
        possible += named_for("mask")
    if several:
        possible += named_for("labels")
    elif "label" in names and any(row["label"] for row in rows):
        possible += [*named_for("class"), *named_for("labels")]
    if not possible:
        raise DataError(f"{path}: no column 'mask', 'label' or 'label_*' with values. It has: {', '.join(names)}")
    if task == "auto":
        return possible[0]
    if task not in possible:
        raise DataError(
            f"{path}: its columns allow {' or '.join(possible)}, but task.kind={task}. Set task.kind or add the column"
        )
    return task


def _labels(
    path: Path, values: list[str], task: Task, classes: tuple[str, ...] | None
) -> tuple[list[Any], tuple[str, ...]]:
    several = task.target == "labels"
    parts = [
        [p.strip() for p in value.split("|") if p.strip()] if several else [value] * bool(value) for value in values
    ]
    found = by_name([p for ps in parts for p in ps])
    names = task.arrange(found, classes, str(path))
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise DataError(
            f"{path}: label {unknown[0]!r} is not in classes.json ({', '.join(names)}). Correct one of them"
        )
    index = {name: k for k, name in enumerate(names)}
    if several:
        return [tuple(int(name in ps) for name in names) for ps in parts], names
    return [index[ps[0]] if ps else None for ps in parts], names


def _flags(path: Path, number: int, row: Row, flags: list[str]) -> tuple[int, ...]:
    values = {"0": 0, "1": 1, "false": 0, "true": 1}
    for name in flags:
        if whole_number(row[name]).lower() not in values:
            raise DataError(f"{path}: row {number}: {name}={row[name]!r} must be 0 or 1. Fill it in, or delete the row")
    return tuple(values[whole_number(row[name]).lower()] for name in flags)


def _splits(path: Path, rows: list[Row]) -> list[Split | None]:
    given = [row.get("split", "") for row in rows]
    if not any(given):
        return [None] * len(rows)
    for number, value in enumerate(given, 2):
        if split_of(value) is None:
            raise DataError(
                f"{path}: row {number}: split={value!r} must be train, val or test. Fill in all rows, or none"
            )
    return [split_of(value) for value in given]


def _locate(root: Path, value: str, kind: str) -> str:
    """The reference of a cell: as written where that exists or nothing does, else with the usual folder or ending."""
    if "://" in value or ".npz#" in value:
        return value
    base = Path(value)
    for folder in _FOLDERS[kind]:
        at = base if base.is_absolute() else root / folder / base
        if exists(at):
            return relative(at, root)
        for suffix in () if base.suffix else SUFFIXES:
            if at.name and exists(at.with_name(at.name + suffix)):
                return relative(at.with_name(at.name + suffix), root)
    return value
