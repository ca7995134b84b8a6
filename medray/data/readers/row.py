"""One row of a table, ``table.csv#17;age?;sex=F|M``, as an image of 1 x 1 pixels; see :mod:`medray.data.rows`.

``Image.original``: ``format`` "table".
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from medray.data.image import Image
from medray.data.readers.header import Header
from medray.data.rows import Column, width
from medray.data.tablefile import Row, read_table
from medray.errors import DataError, UnreadableError


@lru_cache(maxsize=8)
def _table(path: Path, stamp: tuple[int, int]) -> list[Row]:  # noqa: ARG001 (a changed file is read anew)
    return read_table(path)


def read_image(path: Path, member: str) -> Image:
    """(C, 1, 1) of one row; NaN where a number is missing.

    Raises:
        UnreadableError: no such row or column, or text where a number belongs.
    """
    number, _, schema = member.partition(";")
    source = f"{path}#{number}"
    try:
        stat = path.stat()
        rows = _table(path, (stat.st_mtime_ns, stat.st_size))
        if int(number) >= len(rows):
            raise DataError(f"row {number} of {len(rows)}, counted from 0")
        row = rows[int(number)]
        values = [value for text in schema.split(";") for value in Column.parse(text).values(row)]
    except (OSError, DataError) as error:
        raise UnreadableError(source, str(error)) from None
    array = np.array(values, dtype=np.float32).reshape(-1, 1, 1)
    return Image(array=array, spacing=None, modality="table", source=source, original={"format": "table"})


def probe(member: str) -> Header:
    """What a row looks like, without reading it."""
    return Header(shape=(1, 1), channels=width(member.split(";")[1:]), spacing=None, modality="table")
