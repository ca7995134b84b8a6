"""A fingerprint out of sums: each site adds up over its cases what falls into public bins, and sums add up over sites.

So a server can plan from a sum alone, which secure aggregation gives it, or which has noise on it. A case, or under
noise a patient (the mean over its cases), adds to each block of the sums a vector of norm 1 at most, whatever its
images hold: together at most the square root of the number of blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from medray.data.fingerprint import SAMPLES_A_CASE, ChannelStats, Fingerprint, Measured, measure_case
from medray.data.image import Modality
from medray.data.manifest import Case, Manifest
from medray.data.sweep import sweep
from medray.errors import DataError, FederationError
from medray.tasks.catalogue import TaskKind, find_task

__all__ = ["Bins", "Layout", "Schema", "fingerprint_of", "sums_of"]

Row = npt.NDArray[np.float64]

CLEAR = 4.0
"""Standard deviations of its noise that a count has to exceed before it counts as one."""


class Schema(BaseModel):
    """What all sites' data have to agree in. It holds no number that was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskKind
    ndim: int = Field(ge=2, le=3)
    channels: int = Field(ge=1, le=4096)
    modality: Modality
    classes: tuple[str, ...] = Field(min_length=1, max_length=4096)
    columns: tuple[str, ...] = Field(max_length=4096)

    @classmethod
    def of(cls, manifest: Manifest) -> Schema:
        """Of a site's data."""
        return cls.model_validate({name: getattr(manifest, name) for name in cls.model_fields})

    def fits(self, other: Schema) -> bool:
        """Whether both are the same but for the modality, of which one site's files may say more than another's."""
        return self == other.model_copy(update={"modality": self.modality})

    def digest(self) -> str:
        """SHA-256 of what sites have to agree in; the modality is none of it."""
        content = self.model_dump(mode="json", exclude={"modality"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Bins:
    """Half-open bins between rising ``edges`` (M + 1,); what lies beyond the ends is in the outermost."""

    edges: Row

    @property
    def size(self) -> int:
        """How many."""
        return len(self.edges) - 1

    def place(self, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The bin of each value."""
        found = np.searchsorted(self.edges, np.asarray(values, np.float64), side="right") - 1
        return np.clip(found, 0, self.size - 1)

    def counts(self, values: npt.ArrayLike) -> Row:
        """(M,) how many of the values lie in each."""
        return np.bincount(self.place(values).ravel(), minlength=self.size).astype(np.float64)

    def middle(self) -> Row:
        """(M,)"""
        return (self.edges[:-1] + self.edges[1:]) / 2

    def quantile(self, histogram: Row, share: float) -> float:
        """Where ``share`` of the mass lies below, evenly spread within each bin."""
        reached = np.cumsum(histogram)
        at = int(np.searchsorted(reached, share * reached[-1]))
        at = min(at, self.size - 1)
        before = float(reached[at] - histogram[at])
        inside = (share * float(reached[-1]) - before) / float(histogram[at]) if histogram[at] else 0.5
        return float(self.edges[at] + inside * (self.edges[at + 1] - self.edges[at]))


def _octaves(first: int, last: int, parts: int) -> Row:
    """Edges from 2^first to 2^last, so many an octave; powers of two are exactly edges."""
    return np.exp2(np.arange(first * parts, last * parts + 1) / parts)


@dataclass(frozen=True)
class Layout:
    """What stands where in the sums.

    Args:
        schema: of the data.
        coarse: few wide bins, for sums with noise; else fine ones: shapes to the voxel up to 512, spacings to 1 %,
            intensities to 4 %.
    """

    schema: Schema
    coarse: bool

    @cached_property
    def shape(self) -> Bins:
        """Of voxels along an axis."""
        if self.coarse:
            return Bins(_octaves(0, 13, 4))
        return Bins(np.concatenate([np.arange(1.0, 512.0), _octaves(9, 13, 16)]))

    @cached_property
    def spacing(self) -> Bins:
        """Of mm along an axis."""
        return Bins(_octaves(-10, 7, 4 if self.coarse else 64))

    @cached_property
    def intensity(self) -> Bins:
        """Of the files' unit, on both sides of zero."""
        edges = _octaves(-6, 18, 2) if self.coarse else _octaves(-10, 20, 16)
        return Bins(np.concatenate([-edges[::-1], edges]))

    @cached_property
    def blocks(self) -> dict[str, int]:
        """Sizes by name, in order."""
        schema, found = self.schema, {"patients": 1}
        if not self.coarse:
            found["cases"] = 1
        found |= {f"shape {axis}": self.shape.size for axis in range(schema.ndim)}
        found |= {f"spacing {axis}": self.spacing.size for axis in range(schema.ndim)}
        found |= {f"intensity {channel}": self.intensity.size for channel in range(schema.channels)}
        found["shows"] = len(schema.classes)
        if find_task(schema.task).dense:
            found["share"] = len(schema.classes)
        return found

    @property
    def size(self) -> int:
        """Of the sums."""
        return sum(self.blocks.values())

    @property
    def sensitivity(self) -> float:
        """The largest norm of what one patient adds."""
        return math.sqrt(len(self.blocks))

    def split(self, row: Row) -> dict[str, Row]:
        """The sums by block."""
        ends = np.cumsum(list(self.blocks.values()))[:-1]
        return dict(zip(self.blocks, np.split(np.asarray(row, np.float64), ends), strict=True))

    def shown(self) -> float:
        """By what flags of classes are divided, so that all together have norm 1 at most."""
        return 1.0 if find_task(self.schema.task).target == "class" else math.sqrt(len(self.schema.classes))


def sums_of(manifest: Manifest, layout: Layout) -> Row:
    """A site's sums, (layout.size,), over all cases that aren't in a given test split.

    In a coarse layout each patient counts for one, by the mean over its cases; in a fine one each case does.

    Raises:
        FederationError: the data aren't of the layout's schema.
        UnreadableError: a case can't be read.
        DataError: no case is left.
    """
    if not layout.schema.fits(Schema.of(manifest)):
        raise FederationError("the data have another task, other axes, channels, classes or columns than all others")
    cases = [case for case in manifest.cases if case.split != "test"]
    if not cases:
        raise DataError(f"{manifest.source}: no cases outside of the test split. Put some into train")
    patients: dict[str, list[Row]] = {}
    total = np.zeros(layout.size)
    for case, row in zip(cases, _rows(manifest, cases, layout), strict=True):
        if layout.coarse:
            patients.setdefault(case.group, []).append(row)
        else:
            total += row
    if layout.coarse:
        return np.sum([np.mean(rows, axis=0) for rows in patients.values()], axis=0)
    total[0] = len({case.group for case in cases})
    return total


def _rows(manifest: Manifest, cases: list[Case], layout: Layout) -> Iterator[Row]:
    """What each case adds: told by that case alone, never by how many others there are, nor by where it stands."""
    root = Path(manifest.root)

    def work(case: Case) -> Row:
        return _row(measure_case(manifest, case, root, SAMPLES_A_CASE), case, layout)

    yield from sweep(work, cases, name=lambda case: case.id)


def _row(found: Measured, case: Case, layout: Layout) -> Row:
    """What one case adds."""
    schema, parts = layout.schema, [np.ones(1)] * (1 if layout.coarse else 2)
    dense = find_task(schema.task).dense
    parts += [layout.shape.counts([n]) for n in found.shape]
    parts += [
        layout.spacing.counts([found.spacing[axis]]) if found.spacing is not None else np.zeros(layout.spacing.size)
        for axis in range(schema.ndim)
    ]
    for values in found.sample:
        known = values[np.isfinite(values)]
        parts.append(layout.intensity.counts(known) / max(1, known.size))
    shows = np.zeros(len(schema.classes))
    if dense:
        shows[:] = found.voxels > 0
    elif isinstance(case.label, tuple):
        shows[:] = np.asarray(case.label) > 0
    elif case.label is not None:
        shows[case.label] = 1
    parts.append(shows / layout.shown())
    if dense:
        parts.append(found.voxels / max(1, int(found.voxels.sum())))
    return np.concatenate(parts)


def fingerprint_of(total: Row, layout: Layout, *, noise: float = 0.0) -> Fingerprint:
    """The fingerprint that sums over all sites come to, within the width of the bins.

    Not known from sums, and left out: how many cases are which site's, and how many voxels the intensities are of.

    Args:
        total: (layout.size,)
        layout: of the sums.
        noise: standard deviation of the noise on each entry; what doesn't clearly exceed it counts as nothing.

    Raises:
        FederationError: hardly anything exceeds the noise.
    """
    schema, blocks = layout.schema, layout.split(np.maximum(total, 0.0))
    task = find_task(schema.task)

    def clear(name: str) -> Row:
        found = np.where(blocks[name] > CLEAR * noise, blocks[name], 0.0)
        if not found.any() and not name.startswith("spacing"):
            raise FederationError(
                f"of the sites' sums nothing of {name} exceeds the noise (standard deviation {noise:.1f}): too few "
                "patients for federation.fingerprint_epsilon. Raise it, or plan on public data: --fingerprint"
                if noise
                else f"the sites' sums hold nothing of {name}. Do masks have any foreground, columns any number?"
            )
        return found

    patients = round(float(clear("patients")[0]))
    cases = patients if layout.coarse else round(float(blocks["cases"][0]))
    axes = [_extent(layout.shape, clear(f"shape {axis}"), whole=True) for axis in range(schema.ndim)]
    spaced = [clear(f"spacing {axis}") for axis in range(schema.ndim)]
    steps = [_extent(layout.spacing, found) for found in spaced] if all(found.any() for found in spaced) else None
    shows = np.where(blocks["shows"] > noise, blocks["shows"], 0.0) * layout.shown()
    share = blocks["share" if task.dense else "shows"]
    share = np.where(share > noise, share, 0.0)
    median = tuple(int(middle) for _, middle, _ in axes)
    return Fingerprint(
        task=schema.task,
        ndim=3 if schema.ndim == 3 else 2,
        channels=schema.channels,
        modality=schema.modality,
        classes=schema.classes,
        cases=cases,
        patients=patients,
        sites={},
        shape_min=tuple(int(low) for low, _, _ in axes),
        shape_median=median,
        shape_max=tuple(int(high) for _, _, high in axes),
        spacing_min=None if steps is None else tuple(low for low, _, _ in steps),
        spacing_median=None if steps is None else tuple(middle for _, middle, _ in steps),
        spacing_max=None if steps is None else tuple(high for _, _, high in steps),
        intensity=tuple(_channel(layout.intensity, clear(f"intensity {c}")) for c in range(schema.channels)),
        class_cases={name: round(float(n)) for name, n in zip(schema.classes, shows, strict=True)},
        class_fraction={
            name: float(n) / max(float(cases / layout.shown() if task.target == "labels" else share.sum()), 1e-9)
            for name, n in zip(schema.classes, share, strict=True)
        },
        bytes_total=4 * cases * schema.channels * math.prod(median),
        digest=hashlib.sha256(np.ascontiguousarray(total).tobytes()).hexdigest(),
        columns=schema.columns,
    )


def _extent(bins: Bins, histogram: Row, *, whole: bool = False) -> tuple[float, float, float]:
    """Least, median and most, as whole numbers of voxels or in mm; all alike where all lie in one bin."""
    filled = np.flatnonzero(histogram)
    low, high = float(bins.edges[filled[0]]), float(bins.edges[filled[-1] + 1])
    middle = bins.quantile(histogram, 0.5)
    if whole:
        low, high = math.ceil(low), max(math.ceil(low), math.ceil(high) - 1)
        middle = min(max(round(middle - 0.5), low), high)
    if len(filled) == 1:
        low = middle = high = round((low + high) / 2) if whole else math.sqrt(low * high)
    return tuple(round(value, 6) for value in (low, middle, high))  # type: ignore[return-value]


def _channel(bins: Bins, histogram: Row) -> ChannelStats:
    weights, middle = histogram / histogram.sum(), bins.middle()
    mean = float(weights @ middle)
    widths = np.diff(bins.edges)
    variance = float(weights @ ((middle - mean) ** 2 + widths**2 / 12))
    low, half, high = (bins.quantile(histogram, share) for share in (0.005, 0.5, 0.995))
    return ChannelStats(mean=mean, std=math.sqrt(variance), p005=low, p50=half, p995=high)
