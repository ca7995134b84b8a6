"""Items of NumPy archives in MedMNIST's layout: ``archive.npz#train_images/12``.

Arrays are (N, H, W), (N, H, W, 3) or (N, X, Y, Z), one item a case; a last axis of 3 is colour. Nothing is unpickled,
and nothing but the array that is asked for is read. Arrays stored without compression are read item by item; compressed
ones are inflated once a process and kept (the last few, up to a limit), and beyond that limit read as a stream that
goes on from the last item, so that reading in order stays linear.

``Image.original``: ``format`` "npz"; ``path``; ``array``; ``index``; ``nonfinite``.
"""

from __future__ import annotations

import math
import struct
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from medray.data.image import Image, Mask
from medray.data.readers.guard import finite, reading, require_file, require_ratio, require_shape, to_labels
from medray.data.readers.header import Header
from medray.errors import UnreadableError

_KEEP_BYTES = 2**29
_KEEP_ARRAYS = 8


def read_image(path: Path, member: str) -> Image:
    """Read one item, ``member`` being ``array/index``, as (1, H, W), (3, H, W) or (1, X, Y, Z).

    Raises:
        UnreadableError: no such array or index, a damaged archive, pickled objects, or no array of images.
    """
    source = f"{path}#{member}"
    with reading(source, "archive"):
        array, index = _open(path, source, member)
        item = array.item(index)
        values = item.transpose(2, 0, 1) if array.colour else item[None]
        pixels, nonfinite = finite(source, np.ascontiguousarray(values, dtype=np.float32))
        original = {"format": "npz", "path": str(path), "array": array.name, "index": index, "nonfinite": nonfinite}
        return Image(array=pixels, spacing=None, source=source, original=original)


def read_mask(path: Path, member: str) -> Mask:
    """Read one item as a label map, (H, W) or (X, Y, Z).

    Raises:
        UnreadableError: as :func:`read_image`; or it holds colours or fractions.
    """
    source = f"{path}#{member}"
    with reading(source, "archive"):
        array, index = _open(path, source, member)
        if array.colour:
            raise UnreadableError(source, f"an item of shape {array.shape[1:]} is a colour picture, no mask")
        return Mask(array=to_labels(source, array.item(index)), spacing=None, source=source)


def probe(path: Path, member: str) -> Header:
    """Shape and channels from the array's own header.

    Raises:
        UnreadableError: as :func:`read_image`, as far as headers tell.
    """
    source = f"{path}#{member}"
    with reading(source, "archive"):
        array, _ = _open(path, source, member)
        shape = array.shape[1:3] if array.colour else array.shape[1:]
        return Header(shape=shape, channels=3 if array.colour else 1, spacing=None)


def _open(path: Path, source: str, member: str) -> tuple[_Array, int]:
    """The array and the index that ``array/index`` names; arrays are remembered as long as the file is unchanged."""
    name, _, digits = member.rpartition("/")
    if not name or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        raise UnreadableError(source, "name one item, such as archive.npz#train_images/12")
    size = require_file(path)
    key = (str(path.absolute()), path.stat().st_mtime_ns, size, name)
    with _LOCK:
        array = _OPEN.pop(key, None) or _find(path, source, name, size)
        _OPEN[key] = array  # the newest is last
        while len(_OPEN) > 1 and (len(_OPEN) > _KEEP_ARRAYS or sum(a.kept for a in _OPEN.values()) > _KEEP_BYTES):
            _OPEN.popitem(last=False)
    if int(digits) >= array.shape[0]:
        raise UnreadableError(source, f"index {int(digits)} is beyond the {array.shape[0]} items of '{name}'")
    return array, int(digits)


def _find(path: Path, source: str, name: str, size: int) -> _Array:
    """An array of the archive, its claims checked against the zip entry's size."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        entry = entries.get(name)
        if entry is None:
            names = ", ".join(sorted(entries)[:12]) or "nothing"
            raise UnreadableError(source, f"no array '{name}'; the archive holds {names}")
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            else:
                raise UnreadableError(source, f"'{name}' has npy version {version}; 1.0 and 2.0 are read")
            start = stream.tell()
    if dtype.hasobject or dtype.kind not in "iufb":
        raise UnreadableError(source, f"'{name}' holds {dtype}, not numbers; pickled objects are never read")
    if len(shape) not in (3, 4) or any(n < 0 for n in shape):
        raise UnreadableError(source, f"'{name}' has shape {shape}; images are (N, H, W), (N, H, W, 3) or (N, X, Y, Z)")
    if fortran:
        raise UnreadableError(source, f"'{name}' is in Fortran order; save np.ascontiguousarray of it")
    claimed = start + math.prod(shape) * dtype.itemsize
    if claimed != entry.file_size or entry.compress_size > size:
        raise UnreadableError(source, f"'{name}' claims {claimed:,} bytes, its zip entry {entry.file_size:,}: damaged")
    array = _Array(path, source, shape, dtype, start, entry)
    require_shape(source, shape[1:3] if array.colour else shape[1:], 3 if array.colour else 1)
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        require_ratio(source, claimed, entry.compress_size, labels=True)
    return array


class _Array:
    """An array inside an archive, and however much of it is in memory."""

    def __init__(
        self, path: Path, source: str, shape: tuple[int, ...], dtype: np.dtype[Any], start: int, entry: zipfile.ZipInfo
    ) -> None:
        self.name = entry.filename.removesuffix(".npy")
        self.shape, self.dtype = shape, dtype
        self._path, self._source, self._start, self._entry = path, source, start, entry
        self._bytes = math.prod(shape[1:]) * dtype.itemsize
        self._whole: npt.NDArray[Any] | None = None
        self._stream: IO[bytes] | None = None
        self._next = 0  # index of the item at which the stream stands
        self._lock = threading.Lock()

    @property
    def colour(self) -> bool:
        return len(self.shape) == 4 and self.shape[3] == 3

    @property
    def kept(self) -> int:
        """Bytes in memory."""
        return 0 if self._whole is None else self._whole.nbytes

    def item(self, index: int) -> npt.NDArray[Any]:
        """The item ``index``, shape[1:], as stored."""
        with self._lock:
            if self._entry.compress_type == zipfile.ZIP_STORED:
                return self._parse(self._stored(index))
            if self._entry.file_size > _KEEP_BYTES:
                return self._parse(self._streamed(index))
            if self._whole is None:
                with zipfile.ZipFile(self._path) as archive, archive.open(self._entry) as stream:
                    data = stream.read()  # to the end: zipfile checks the CRC there
                count = math.prod(self.shape)
                self._whole = np.frombuffer(data, self.dtype, count, self._start).reshape(self.shape)
            return self._whole[index]

    def _parse(self, data: bytes) -> npt.NDArray[Any]:
        if len(data) != self._bytes:
            raise UnreadableError(self._source, f"truncated: {len(data):,} of an item's {self._bytes:,} bytes")
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])

    def _stored(self, index: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))  # of the local header, which has 30 bytes
            file.seek(name_length + extra_length + self._start + index * self._bytes, 1)
            return file.read(self._bytes)

    def _streamed(self, index: int) -> bytes:
        if self._stream is None or index < self._next:
            archive = zipfile.ZipFile(self._path)
            self._stream, self._next = archive.open(self._entry), 0
            self._stream.read(self._start)
        for _ in range(index - self._next):
            self._stream.read(self._bytes)
        self._next = index + 1
        return self._stream.read(self._bytes)


_LOCK = threading.Lock()
_OPEN: OrderedDict[tuple[str, int, int, str], _Array] = OrderedDict()
