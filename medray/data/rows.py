"""Rows of a table as arrays that a network can see: numbers as they are, kinds one-hot, what is missing stated.

A column is written ``age`` (a number: one channel), ``age?`` (one that some rows lack: a second channel, 1 where it is
missing), or ``sex=F|M`` (kinds: a channel each; none is set where the cell is empty or holds another). Names and kinds
are percent-encoded, so that any text can stand in them. ``cases.csv#17;age?;sex=F|M`` is the row 17, from 0, as an
image of 1 x 1 pixels with four channels; a missing number is NaN there, and becomes the mean when it is prepared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from medray.data.manifest import Finding
from medray.data.tablefile import Row, cell, nearest, whole_number
from medray.errors import DataError

__all__ = ["Column", "columns_of", "is_row", "missing_values", "reference", "width"]

MOST_KINDS = 100


@dataclass(frozen=True)
class Column:
    """One column and how it is seen.

    Attributes:
        name: in the table's header.
        kinds: what its cells hold, in order; empty for a number.
        gaps: whether a number's absence has a channel of its own.
    """

    name: str
    kinds: tuple[str, ...] = ()
    gaps: bool = False

    @property
    def channels(self) -> int:
        """How many it takes."""
        return len(self.kinds) or 1 + self.gaps

    def text(self) -> str:
        """As it is written in a reference."""
        head = quote(self.name, safe="")
        if self.kinds:
            return f"{head}={'|'.join(quote(kind, safe='') for kind in self.kinds)}"
        return head + "?" * self.gaps

    @classmethod
    def parse(cls, text: str) -> Column:
        """Read :meth:`text`."""
        head, equals, kinds = text.partition("=")
        if equals:
            return cls(unquote(head), tuple(unquote(kind) for kind in kinds.split("|")))
        return cls(unquote(head.removesuffix("?")), gaps=head.endswith("?"))

    def values(self, row: Row) -> list[float]:
        """The channels of one row; NaN for a number that is missing.

        Raises:
            DataError: the row has no such column, or text where a number belongs.
        """
        if self.name not in row:
            raise DataError(f"no column {self.name!r}{nearest(self.name, row)}. It has: {', '.join(row)}")
        text = row[self.name]
        if self.kinds:
            return [float(kind == whole_number(text)) for kind in self.kinds]
        value = cell(text)
        if isinstance(value, str) and not _is_gap(value):
            raise DataError(f"column {self.name!r} holds {value[:60]!r}, a number is expected")
        number = value if isinstance(value, float) else math.nan
        return [number, float(math.isnan(number))] if self.gaps else [number]


def _is_gap(text: str) -> bool:
    return text.strip().lower() in ("", "?", "na", "n/a", "nan", "null", "none", "-")


def width(schema: Sequence[str]) -> int:
    """Channels of all columns, as they are written."""
    return sum(Column.parse(text).channels for text in schema)


def reference(table: str, number: int, schema: Sequence[Column | str]) -> str:
    """The reference of a row."""
    return ";".join([f"{table}#{number}", *(c if isinstance(c, str) else c.text() for c in schema)])


def columns_of(path: Path, rows: Sequence[Row], asked: str, free: Sequence[str]) -> tuple[Column, ...]:
    """The columns that a person asked for, with the kinds and gaps that the rows show.

    Args:
        path: for errors.
        rows: all of the table.
        asked: ``*``, or names with commas between; ``NAME:kind`` for numbers that stand for kinds.
        free: columns without another meaning.

    Raises:
        DataError: a name that there is not, or more kinds than a network should be given.
    """
    named = [part.strip() for part in asked.split(",") if part.strip()] if asked != "*" else list(free)
    found = []
    for part in named:
        name, _, mark = part.rpartition(":") if part.endswith(":kind") else (part, "", "")
        if name not in free:
            raise DataError(
                f"{path}: columns={asked}: no column {name!r}{nearest(name, free)}. There are {', '.join(free)}"
            )
        cells = [row[name] for row in rows]
        full = [text for text in cells if not _is_gap(text)]
        numbers = all(isinstance(cell(text), float) for text in full)
        if not full:
            raise DataError(f"{path}: column {name!r} holds no value at all. Leave it out of columns=")
        if mark or not numbers:
            kinds = tuple(sorted({whole_number(text) for text in full}, key=lambda t: (_number(t), t)))
            if len(kinds) > MOST_KINDS:
                raise DataError(
                    f"{path}: column {name!r} holds {len(kinds)} different texts, at most {MOST_KINDS} can be kinds. "
                    "Leave it out of columns="
                )
            found.append(Column(name, kinds))
        else:
            found.append(Column(name, gaps=len(full) < len(cells)))
    if not found:
        raise DataError(f"{path}: columns={asked} names no column to learn from")
    return tuple(found)


def _number(text: str) -> float:
    value = cell(text)
    return value if isinstance(value, float) else math.inf


def missing_values(rows: Sequence[Row], schema: Sequence[Column]) -> Iterator[Finding]:
    """What to say of columns with gaps."""
    for column in schema:
        gaps = sum(_is_gap(row[column.name]) for row in rows)
        if gaps:
            how = "no kind is set there" if column.kinds else "they count as the mean, and a channel of its own says so"
            yield Finding(
                rule="missing",
                severity="warning",
                case=None,
                message=f"column {column.name!r} lacks {gaps} of {len(rows)} values: {how}",
                fix="fill them in, or leave the column out of columns=",
            )


def is_row(member: str) -> bool:
    """Whether what stands behind '#' names a row of a table."""
    return ";" in member and member.partition(";")[0].isdigit()
