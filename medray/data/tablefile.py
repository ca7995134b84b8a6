"""Table files, CSV, TSV or Parquet, as text by row and column."""

from __future__ import annotations

import csv
import difflib
import math
from collections import Counter
from pathlib import Path
from typing import Any

from medray.errors import DataError, MissingDependencyError

__all__ = ["TABLES", "Row", "cell", "columns", "is_table", "nearest", "read_table", "whole_number"]

TABLES = (".csv", ".tsv", ".parquet")

Row = dict[str, str]


def is_table(path: Path) -> bool:
    """Whether the path ends as a table does."""
    return path.suffix.lower() in TABLES


def columns(path: Path) -> list[str]:
    """The names of a table's columns."""
    if path.suffix.lower() == ".parquet":
        return [str(n) for n in _parquet(path).schema_arrow.names]
    with _opened(path) as stream:
        return next(_csv_rows(stream, path), [])


def read_table(path: Path, naming: dict[str, str] | None = None) -> list[Row]:
    """The rows, as text by column name; ``naming`` renames columns (known name to the file's own).

    Raises:
        DataError: the file can't be read, has rows of another length, or lacks a column that ``naming`` names.
    """
    if path.suffix.lower() == ".parquet":
        rows = [{str(k): _text(v) for k, v in row.items()} for row in _parquet(path).read().to_pylist()]
        names = columns(path)
    else:
        with _opened(path) as stream:
            lines = _csv_rows(stream, path)
            names = next(lines, [])
            rows = []
            for number, line in enumerate(lines, 2):
                if not any(cell.strip() for cell in line):
                    continue
                if len(line) != len(names):
                    raise DataError(
                        f"{path}: line {number} has {len(line)} cells, the header {len(names)}. Quote cells with commas"
                    )
                rows.append({name: cell.strip() for name, cell in zip(names, line, strict=True)})
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} stands twice. Rename one")
    for known, own in (naming or {}).items():
        if own not in names:
            raise DataError(f"{path}: no column {own!r}{nearest(own, names)}. It has: {', '.join(names)}")
        for row in rows:
            row[known] = row[own] if known in names and known != own else row.pop(own, row.get(known, ""))
    return rows


def nearest(word: str, words: Any) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}. Give a table that can be read") from None


def _csv_rows(stream: Any, path: Path) -> Any:
    try:
        head = stream.readline()
        stream.seek(0)
        counts = {mark: head.count(mark) for mark in ",;\t"}
        mark = max(counts, key=lambda m: counts[m])
        for number, line in enumerate(csv.reader(stream, delimiter=mark, strict=True)):
            yield [cell.strip() for cell in line] if number == 0 else line
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: no table in UTF-8 ({error}). Save it as CSV, UTF-8") from None


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependencyError("pyarrow", "reading Parquet", "pip install pyarrow") from None
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: no Parquet file ({error})") from None


def whole_number(text: str) -> str:
    """``1.0``, as other programs write the integers of a column with gaps, to ``1``; anything else as it is."""
    head, dot, tail = text.partition(".")
    return head if dot and head.lstrip("-").isdigit() and tail.strip("0") == "" else text


def cell(text: str) -> str | float | None:
    """What a cell holds: a number where it is one, None where it is empty, else its text."""
    if not text or text.lower() == "nan":
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) and "_" not in text else text
