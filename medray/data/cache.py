"""PreparedStore: every case of a manifest, prepared once and mapped into memory from then on.

One flat file holds all images and one all masks, whatever their shapes: ten thousand thumbnails or a hundred volumes
cost two file handles, and processes share the pages. On disk, ``DIRECTORY/<digest>/``:

    images.bin       float32, the cases' (C, *s) arrays one after the other
    masks.bin        uint8, their (*s) label maps; absent without masks
    index.npz        shapes, geometries, sampled foreground voxels
    store.json       version, digest, size of each file

The digest covers how images are prepared and, for each case, its references with the size and modification time of the
files behind them, as make and git do it: to read gigabytes again only to learn that nothing changed would cost more
than the training. Labels, splits and patients are not in it; they are the manifest's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from medray.config.schema import PreprocessConfig
from medray.data import shelf
from medray.data.manifest import IGNORE, Case, Manifest
from medray.data.preprocess import Geometry, Preprocessor
from medray.data.rows import is_row
from medray.errors import DataError, UnreadableError
from medray.tasks.catalogue import find_task

__all__ = ["PreparedStore", "Progress"]

Progress = Callable[[int, int], None]
"""Told (done, total) after each case."""

_VERSION = 1
_FOREGROUND_PER_CLASS = 1000  # sampled voxels of each class of a case: enough places for patches to be centred on
_STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class _Prepared:
    image: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8] | None
    geometry: Geometry
    voxels: npt.NDArray[np.int32]  # (N, ndim)
    classes: npt.NDArray[np.uint8]  # (N,)


class PreparedStore:
    """The prepared cases, by their index in ``manifest.cases``. Opened lazily in each process; picklable.

    Attributes:
        path: its folder.
        ndim, channels: of every image.
        classes: names; background first in segmentation.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.ndim, self.channels, self.classes = manifest.ndim, manifest.channels, manifest.classes
        self._labels = tuple(case.label for case in manifest.cases)
        with np.load(path / "index.npz", allow_pickle=False) as index:
            self._index = {name: index[name] for name in index.files}
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self._alike: bool | None = None  # whether all images have one shape
        self._held = shelf.hold(path)

    @classmethod
    def open_or_build(
        cls,
        manifest: Manifest,
        config: PreprocessConfig,
        directory: Path,
        *,
        progress: Progress | None = None,
    ) -> PreparedStore:
        """Open the store of these cases prepared in this way, building it first where it is absent or damaged.

        It is built in a folder beside and renamed, by one process while others wait for it: a process that is killed,
        or several that build at once, leave nothing half made. Then the folder is trimmed to
        :func:`medray.data.shelf.limit`.

        Raises:
            UnreadableError: a file can't be decoded.
            DataError: a case doesn't fit the manifest (channels, shapes, labels), or the disk is full.
            ConfigError: ``config`` doesn't fit the manifest.
        """
        preprocessor = Preprocessor(config, ndim=manifest.ndim, channels=manifest.channels)
        digest = _digest(manifest, config)
        path = directory / digest[:24]
        most = shelf.limit(directory)
        for last in (False, True):
            try:
                with contextlib.ExitStack() as held:
                    if not _is_whole(path, digest):
                        with shelf.builder(directory, path.name):
                            if not _is_whole(path, digest):
                                held.enter_context(_build(manifest, preprocessor, directory, path, digest, progress))
                        shelf.trim(directory, most, keep=path)
                    return cls(path, manifest)
            except OSError as error:
                # Trimmed away by another process between two lines; or full, and there was something to trim.
                gone = isinstance(error, FileNotFoundError)
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not last and (gone or (full and shelf.trim(directory, 0))):
                    continue
                raise DataError(
                    f"{directory}: the prepared images can't be written ({error.strerror or error}). Free some "
                    "space, or choose another folder"
                ) from error
        raise AssertionError("unreachable")

    def __len__(self) -> int:
        return len(self._labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held = shelf.hold(self.path)

    def image(self, i: int) -> npt.NDArray[np.float32]:
        """(C, *s) float32, a read-only view of the file."""
        start, shape = int(self._index["starts"][i]), self.shape(i)
        size = self.channels * int(np.prod(shape))
        flat = self._map("images.bin", np.float32)[start * self.channels :][:size]
        return flat.reshape(self.channels, *shape)

    def images(self, cases: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(B, C, *s) float32, copies of images that have one shape."""
        shape = self.shape(int(cases[0]))
        if self._alike is None:
            self._alike = bool((self._index["shapes"] == self._index["shapes"][0]).all())
        if self._alike:  # thumbnails: one gather rather than thousands of slices
            every = self._map("images.bin", np.float32).reshape(-1, self.channels, *shape)
            return np.take(every, cases, axis=0)
        return np.stack([self.image(int(i)) for i in cases])

    def mask(self, i: int) -> npt.NDArray[np.uint8] | None:
        """(*s) uint8, a read-only view of the file; None where the case has no mask."""
        if not self._index["masked"][i]:
            return None
        start, shape = int(self._index["starts"][i]), self.shape(i)
        return self._map("masks.bin", np.uint8)[start:][: int(np.prod(shape))].reshape(shape)

    def label(self, i: int) -> int | tuple[int, ...] | None:
        """As in the manifest."""
        return self._labels[i]

    def shape(self, i: int) -> tuple[int, ...]:
        """*s, the prepared spatial shape."""
        return tuple(int(n) for n in self._index["shapes"][i])

    def geometry(self, i: int) -> Geometry:
        """How the prepared array lies in the image that it came from."""
        index = self._index
        spacing = index["spacings"][i]
        return Geometry(
            shape=tuple(int(n) for n in index["originals"][i]),
            crop=tuple((int(a), int(b)) for a, b in index["crops"][i]),
            resized=tuple(int(n) for n in index["resized"][i]),
            pad=tuple((int(a), int(b)) for a, b in index["pads"][i]),
            spacing=None if np.isnan(spacing).any() else tuple(float(mm) for mm in spacing),
        )

    def foreground(self, i: int) -> npt.NDArray[np.int32]:
        """(N, ndim) coordinates of sampled foreground voxels, up to 1000 of each class, in the prepared array."""
        return self._index["voxels"][self._voxels_of(i)]

    def foreground_classes(self, i: int) -> npt.NDArray[np.uint8]:
        """(N,) class of each voxel of :meth:`foreground`, ascending."""
        return self._index["voxel_classes"][self._voxels_of(i)]

    def _voxels_of(self, i: int) -> slice:
        first, last = self._index["voxel_starts"][i : i + 2]
        return slice(int(first), int(last))

    def _map(self, name: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
        if name not in self._maps:  # as a plain array: slices of a memmap cost several times as much
            self._maps[name] = np.memmap(self.path / name, dtype=dtype, mode="r").view(np.ndarray)
        return self._maps[name]


def _digest(manifest: Manifest, config: PreprocessConfig) -> str:
    head = [_VERSION, config.model_dump(mode="json"), manifest.task, manifest.ndim, manifest.channels, manifest.classes]
    digest = hashlib.sha256(json.dumps(head).encode())
    root = Path(manifest.root)
    seen: dict[Path, str] = {}
    for case in manifest.cases:
        for reference in (*case.images, case.mask or "", case.valid or ""):
            digest.update(f"{reference}\0{_stamp(root, reference, seen)}\n".encode())
    return digest.hexdigest()


def _stamp(root: Path, reference: str, seen: dict[Path, str]) -> str:
    """Size and modification time of the file behind a reference, or of every file of a directory; "" for phantoms."""
    if not reference or reference.startswith("phantom://"):
        return ""
    whole, _, member = reference.rpartition("#")
    path = root / (whole if is_row(member) else reference)
    try:
        if "#" in reference and not path.exists():  # an item of an archive: thousands of them share one file
            path = root / reference.rpartition("#")[0]
        if path not in seen:
            parts = sorted(path.iterdir()) if path.is_dir() else [path]
            seen[path] = ";".join(f"{p.name}:{s.st_size}:{s.st_mtime_ns}" for p in parts for s in [p.stat()])
    except OSError as error:
        raise UnreadableError(path, error.strerror or str(error)) from None
    return seen[path]


def _is_whole(path: Path, digest: str) -> bool:
    """Whether the store is there, of this version, with every file as long as it was written."""
    try:
        stated = json.loads((path / "store.json").read_text(encoding="utf-8"))
        return (
            stated["version"] == _VERSION
            and stated["digest"] == digest
            and all((path / name).stat().st_size == size for name, size in stated["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(
    manifest: Manifest, preprocessor: Preprocessor, directory: Path, path: Path, digest: str, progress: Progress | None
) -> contextlib.AbstractContextManager[object]:
    """Build the store and hold it, until what this returns is closed: others may trim the folder at any time."""
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=directory))
    try:
        _write(manifest, preprocessor, building, digest, progress)
        if path.exists():  # damaged, or another process was faster
            if _is_whole(path, digest):
                return contextlib.nullcontext()
            shutil.rmtree(path, ignore_errors=True)
        held = shelf.hold(building)
        try:
            building.rename(path)
        except OSError:
            held.close()
            if not _is_whole(path, digest):
                raise
            return contextlib.nullcontext()
        return held
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Remove what builds that were killed more than a day ago left behind."""
    for left in directory.glob(".building-*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue


def _write(
    manifest: Manifest, preprocessor: Preprocessor, folder: Path, digest: str, progress: Progress | None
) -> None:
    dense = find_task(manifest.task).dense
    geometries: list[Geometry] = []
    masked: list[bool] = []
    voxels: list[npt.NDArray[np.int32]] = []
    classes: list[npt.NDArray[np.uint8]] = []
    with (folder / "images.bin").open("wb") as images, (folder / "masks.bin").open("wb") as masks:
        for done, prepared in enumerate(_prepare_all(manifest, preprocessor), start=1):
            prepared.image.tofile(images)
            # a case without a mask takes its place all the same (as a hole), so that one offset serves both files
            blank = np.full(prepared.geometry.prepared, IGNORE, np.uint8) if prepared.mask is None else prepared.mask
            if dense:
                blank.tofile(masks)
            geometries.append(prepared.geometry)
            masked.append(prepared.mask is not None)
            voxels.append(prepared.voxels)
            classes.append(prepared.classes)
            if progress is not None:
                progress(done, len(manifest.cases))
        _settle(images)
        _settle(masks)
    shapes = np.array([g.prepared for g in geometries], dtype=np.int64)
    with (folder / "index.npz").open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            starts=np.concatenate([[0], np.cumsum(shapes.prod(axis=1))]),
            shapes=shapes,
            masked=np.array(masked),
            originals=np.array([g.shape for g in geometries], dtype=np.int64),
            crops=np.array([g.crop for g in geometries], dtype=np.int64),
            resized=np.array([g.resized for g in geometries], dtype=np.int64),
            pads=np.array([g.pad for g in geometries], dtype=np.int64),
            spacings=np.array([g.spacing or (np.nan,) * manifest.ndim for g in geometries], dtype=np.float64),
            voxels=np.concatenate(voxels),
            voxel_classes=np.concatenate(classes),
            voxel_starts=np.cumsum([0, *map(len, voxels)]),
        )
        _settle(file)
    if not dense:
        (folder / "masks.bin").unlink()
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    stated = {"version": _VERSION, "digest": digest, "source": manifest.source, "files": files}
    with (folder / "store.json").open("wb") as file:
        file.write(json.dumps(stated, indent=1).encode())
        _settle(file)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _prepare_all(manifest: Manifest, preprocessor: Preprocessor) -> Iterator[_Prepared]:
    """All cases in order, some ahead in threads (decoding and resampling let go of the interpreter's lock)."""
    threads = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[_Prepared]] = deque()
        try:
            for number, case in enumerate(manifest.cases):
                ahead.append(pool.submit(_prepare_one, manifest, preprocessor, case, number))
                if len(ahead) > threads:  # bounds what is in memory to a volume a thread and one waiting
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _prepare_one(manifest: Manifest, preprocessor: Preprocessor, case: Case, number: int) -> _Prepared:
    from medray.data.readers import read_case

    image, mask, valid = read_case(case, Path(manifest.root))
    array, geometry = preprocessor.prepare(image)
    labels = None
    voxels = np.empty((0, manifest.ndim), np.int32)
    classes = np.empty(0, np.uint8)
    if mask is not None and find_task(manifest.task).dense:
        labels = preprocessor.prepare_mask(mask, geometry, valid)
        voxels, classes = _sample_foreground(labels, number)
        if len(classes) and classes[-1] >= len(manifest.classes):
            raise DataError(
                f"case {case.id}: its mask has the label {classes[-1]}, the data set has {len(manifest.classes)} "
                f"classes (0..{len(manifest.classes) - 1}). Correct the mask, or name the class"
            )
    return _Prepared(array, labels, geometry, voxels, classes)


def _sample_foreground(
    labels: npt.NDArray[np.uint8], number: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Up to 1000 voxels of each class but background and IGNORE: coordinates (N, ndim), classes (N,) ascending."""
    rng = np.random.default_rng(number)
    flat = labels.reshape(-1)
    picked: list[npt.NDArray[np.int64]] = []
    for k in np.flatnonzero(np.bincount(flat, minlength=256)):
        if k not in (0, IGNORE):
            where = np.flatnonzero(flat == k)
            if len(where) > _FOREGROUND_PER_CLASS:
                where = np.sort(rng.choice(where, _FOREGROUND_PER_CLASS, replace=False))
            picked.append(where)
    if not picked:
        return np.empty((0, labels.ndim), np.int32), np.empty(0, np.uint8)
    chosen = np.concatenate(picked)
    return np.stack(np.unravel_index(chosen, labels.shape), axis=1).astype(np.int32), flat[chosen]
