"""Fingerprint: what was measured on the data. The plan sees nothing else, and the test split is never looked at."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from medray.data.document import Document
from medray.data.image import Modality
from medray.data.manifest import IGNORE, Case, Manifest
from medray.data.readers import read_case
from medray.data.sweep import Progress, sweep
from medray.errors import DataError
from medray.tasks.catalogue import TaskKind, find_task

SAMPLES_A_CASE = 20_000
"""Values of each channel that are looked at in a case, at the most."""
_SAMPLES = 4_000_000
_CHUNK = 1 << 20
_PERCENTILES = (0.5, 50.0, 99.5)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChannelStats(_Frozen):
    """Intensities of one channel, in the files' unit: over foreground voxels (segmentation) or all (otherwise).

    ``mean`` and ``std`` are exact, over ``count`` values (0: not known); the percentiles (0.5, 50, 99.5) are of a
    sample that is bounded per case. Values that a table lacks count nowhere.
    """

    mean: float
    std: float
    p005: float
    p50: float
    p995: float
    count: int = 0


class Fingerprint(_Frozen, Document):
    """What was measured on all cases but those of a given test split.

    Attributes:
        shape_min, shape_median, shape_max: voxels per axis, each axis on its own.
        spacing_min, spacing_median, spacing_max: mm per axis; None where no file has any.
        class_cases: how many cases show the class.
        class_fraction: its share of the voxels (segmentation, inside the region of interest) or of the cases.
        bytes_total: of all images as float32.
        digest: SHA-256 over pixels, masks and labels, whatever the files are called.
    """

    made_by: ClassVar[str] = "medray plan DATA"

    version: Literal[1] = 1
    task: TaskKind
    ndim: Literal[2, 3]
    channels: int
    modality: Modality
    classes: tuple[str, ...]
    cases: int
    patients: int
    sites: dict[str, int]
    shape_min: tuple[int, ...]
    shape_median: tuple[int, ...]
    shape_max: tuple[int, ...]
    spacing_min: tuple[float, ...] | None
    spacing_median: tuple[float, ...] | None
    spacing_max: tuple[float, ...] | None
    intensity: tuple[ChannelStats, ...]
    class_cases: dict[str, int]
    class_fraction: dict[str, float]
    bytes_total: int
    digest: str
    columns: tuple[str, ...] = ()


@dataclass
class Measured:
    """Of one case. ``sums`` (C, 3): count, sum, sum of squares of the voxels that count; ``sample`` (C, n)."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...] | None
    nbytes: int
    sums: npt.NDArray[np.float64]
    sample: npt.NDArray[np.float32]
    voxels: npt.NDArray[np.int64]
    digest: bytes


def measure(manifest: Manifest, *, progress: Progress | None = None) -> Fingerprint:
    """Measure every case that is not in a given test split; memory holds a few cases and a bounded sample.

    Args:
        manifest: a checked one; set the drawn test split in it first, or its cases are measured too.
        progress: called with (done, all, case id).

    Raises:
        UnreadableError: a case can't be read.
        DataError: no case is left.
    """
    cases = [case for case in manifest.cases if case.split != "test"]
    if not cases:
        raise DataError(f"{manifest.source}: no cases outside of the test split. Put some into train")
    root = Path(manifest.root)
    budget = max(100, min(SAMPLES_A_CASE, _SAMPLES // len(cases)))
    found = list(
        sweep(lambda case: measure_case(manifest, case, root, budget), cases, progress, name=lambda case: case.id)
    )
    # Masks may be empty all over; then the whole images have to do.
    if not any(one.sums[:, 0].any() for one in found):
        found = list(sweep(lambda case: measure_case(manifest, case, root, budget, whole=True), cases))
    shapes = np.array([one.shape for one in found])
    known = [one.spacing for one in found if one.spacing is not None]
    spacings = np.array(known) if known else None
    class_cases, class_fraction = _balance(manifest, cases, found)
    digest = hashlib.sha256(json.dumps([manifest.task, manifest.classes]).encode())
    for one in found:
        digest.update(one.digest)
    return Fingerprint(
        task=manifest.task,
        ndim=manifest.ndim,
        channels=manifest.channels,
        modality=manifest.modality,
        classes=manifest.classes,
        cases=len(cases),
        patients=len({case.group for case in cases}),
        sites=dict(sorted(Counter(case.site for case in cases if case.site is not None).items())),
        shape_min=_whole(shapes.min(0)),
        shape_median=_whole(np.median(shapes, axis=0)),
        shape_max=_whole(shapes.max(0)),
        spacing_min=None if spacings is None else _floats(spacings.min(0)),
        spacing_median=None if spacings is None else _floats(np.median(spacings, axis=0)),
        spacing_max=None if spacings is None else _floats(spacings.max(0)),
        intensity=_intensity(found),
        class_cases=class_cases,
        class_fraction=class_fraction,
        bytes_total=sum(one.nbytes for one in found),
        digest=digest.hexdigest(),
        columns=manifest.columns,
    )


def measure_case(manifest: Manifest, case: Case, root: Path, budget: int, *, whole: bool = False) -> Measured:
    """Measure one case; of the same case, among whatever others, it is the same.

    Args:
        manifest: of it and others, which it has to be like.
        case: which.
        root: of its paths.
        budget: values of each channel that the sample has at the most.
        whole: take all voxels, not the foreground's alone.

    Raises:
        UnreadableError: it can't be read.
        DataError: it isn't like the manifest.
    """
    image, mask, valid = read_case(case, root)
    array = image.array
    if array.shape[0] != manifest.channels or image.ndim != manifest.ndim:
        wanted = f"{manifest.channels} channels, {manifest.ndim} axes"
        raise DataError(
            f"{case.id}: has {array.shape[0]} channels, {image.ndim} axes; the data set {wanted}. Run: medray check"
        )
    state = hashlib.sha256(repr((array.shape, case.label)).encode())
    state.update(np.ascontiguousarray(array).view(np.uint8).data)
    inside = None if valid is None else valid.array > 0
    voxels = np.zeros(len(manifest.classes), np.int64)
    where = inside
    dense = find_task(manifest.task).dense
    if dense and mask is not None:
        labels = mask.array
        state.update(np.ascontiguousarray(labels.astype(np.int32)).tobytes())
        counted = labels != IGNORE if inside is None else (labels != IGNORE) & inside
        if labels[counted].size and int(labels[counted].max()) >= len(voxels):
            raise DataError(
                f"{case.id}: label {int(labels[counted].max())} with {len(voxels)} classes. Run: medray check"
            )
        voxels = np.bincount(labels[counted].ravel(), minlength=len(voxels)).astype(np.int64)
        where = counted if whole else counted & (labels > 0)
    elif dense:
        where = np.zeros(image.shape, bool)
    values = array.reshape(array.shape[0], -1) if where is None else array[:, where]
    sums = np.zeros((len(values), 3))
    sums[:, 0] = values.shape[1]
    for start in range(0, values.shape[1], _CHUNK):  # in doubles, but never the whole volume in doubles
        exact = values[:, start : start + _CHUNK].astype(np.float64)
        if manifest.columns:
            lacking = ~np.isfinite(exact)
            sums[:, 0] -= lacking.sum(1)
            exact[lacking] = 0
        sums[:, 1] += exact.sum(1)
        sums[:, 2] += (exact**2).sum(1)
    # Bounded per case, as in nnU-Net: large cases shall not drown the small ones, nor fill the memory. Drawn by what
    # the case itself holds: by its place, a patient more would change what is seen of all others.
    sample = values
    if values.shape[1] > budget:
        rng = np.random.default_rng(np.frombuffer(state.digest(), np.uint32))
        sample = values[:, np.sort(rng.choice(values.shape[1], budget, replace=False, shuffle=False))]
    return Measured(image.shape, image.spacing, array.size * 4, sums, np.array(sample), voxels, state.digest())


def _intensity(found: list[Measured]) -> tuple[ChannelStats, ...]:
    totals = np.sum([one.sums for one in found], axis=0)
    count = np.maximum(totals[:, 0], 1)
    mean = totals[:, 1] / count
    std = np.sqrt(np.maximum(totals[:, 2] / count - mean**2, 0))
    pooled = np.concatenate([one.sample for one in found], axis=1)
    if not np.isfinite(pooled).all():
        pooled = np.where(np.isfinite(pooled).any(1, keepdims=True), pooled, 0)  # a column without any value
    low, middle, high = np.nanpercentile(pooled, _PERCENTILES, axis=1)
    return tuple(
        ChannelStats(
            mean=float(mean[c]),
            std=float(std[c]),
            p005=float(low[c]),
            p50=float(middle[c]),
            p995=float(high[c]),
            count=int(totals[c, 0]),
        )
        for c in range(len(mean))
    )


def _balance(manifest: Manifest, cases: list[Case], found: list[Measured]) -> tuple[dict[str, int], dict[str, float]]:
    shown: npt.NDArray[Any]
    if find_task(manifest.task).dense:
        voxels = np.stack([one.voxels for one in found])
        shown = (voxels > 0).sum(0)
        share = voxels.sum(0) / max(1, int(voxels.sum()))
    else:
        flags = np.zeros((len(cases), len(manifest.classes)))
        for row, case in zip(flags, cases, strict=True):
            if isinstance(case.label, tuple):
                row[:] = case.label
            elif case.label is not None:
                row[case.label] = 1
        shown, share = flags.sum(0), flags.mean(0)
    names = manifest.classes
    return (
        {name: int(n) for name, n in zip(names, shown, strict=True)},
        {name: float(s) for name, s in zip(names, share, strict=True)},
    )


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(round(v) for v in values)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(round(v, 6)) for v in values)
