"""From the positions of DICOM slices to one regular voxel grid.

Slices are ordered by their position projected on the common normal of their planes (DICOM PS3.3 C.7.6.2.1.1), and have
to be evenly spaced: a missing slice or an irregular step would put anatomy where it isn't. A gantry tilt (the slices'
corners drift sideways as the normal advances) is kept as it is: the affine is sheared and exact, the angle reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medray.errors import UnreadableError

_PARALLEL = 1e-3  # largest difference of direction cosines within one stack
_SAME_PLACE_MM = 0.01
_EVEN = 0.05  # largest deviation of a step from the median, in steps: headers round to 0.01 or 0.1 mm
_STRAIGHT = 0.5  # largest sideways deviation of a slice from the stack's axis, in pixels
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One 2-D frame of pixels and where it lies.

    Attributes:
        path: its file.
        index: of the frame in the file, from 0.
        instance: identifies it; copies have the same.
        number: InstanceNumber, the order among frames at one place.
        size: (rows, columns).
        position: (3,) LPS mm of the first pixel's centre.
        orientation: (6,) direction cosines, along a row, then down a column.
        spacing: mm (between rows, between columns).
        thickness: mm.
    """

    path: Path
    index: int
    instance: str
    number: int
    size: tuple[int, int]
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Frames in order.

    Attributes:
        frames: [slice][repeat].
        affine: (4, 4), index (column, row, slice) to RAS mm; None for one frame without geometry.
        spacing: mm (between rows, between columns); None where unknown.
        tilt: gantry tilt in degrees.
    """

    frames: tuple[tuple[Frame, ...], ...]
    affine: npt.NDArray[np.float64] | None
    spacing: tuple[float, ...] | None
    tilt: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(columns, rows, slices)."""
        rows, columns = self.frames[0][0].size
        return columns, rows, len(self.frames)

    @property
    def flat(self) -> bool:
        """Whether there is but one slice: a 2-D image."""
        return len(self.frames) == 1


def stack(source: object, frames: Sequence[Frame]) -> Grid:
    """Order frames into a grid.

    Args:
        source: named in errors.
        frames: of one series, in any order, copies among them.

    Raises:
        UnreadableError: frames without geometry, of different size or direction, missing, irregular, unevenly many.
    """
    frames = list({frame.instance: frame for frame in frames}.values())
    first = frames[0]
    located = first.position is not None and first.orientation is not None and first.spacing is not None
    if len(frames) == 1 and not located:
        return Grid(frames=((first,),), affine=None, spacing=first.spacing, tilt=0.0)
    row, column, normal = common_plane(source, frames)
    assert first.spacing is not None
    slices = _ordered(source, frames, normal)
    corners = np.array([places[0].position for places in slices])
    step, tilt = normal * (first.thickness or 1.0), 0.0
    if len(slices) > 1:
        _require_even(source, slices, corners @ normal)
        step = (corners[-1] - corners[0]) / (len(slices) - 1)
        bend = np.linalg.norm(corners - corners[0] - np.outer(np.arange(len(slices)), step), axis=1)
        # along the normal, steps were judged already: what is left is sideways
        if bend.max() > _STRAIGHT * min(first.spacing) + _EVEN * np.linalg.norm(step) * len(slices) ** 0.5:
            where = slices[int(bend.argmax())][0].path.name
            raise UnreadableError(source, f"{where} lies {bend.max():.2f} mm beside the line through the other slices")
        tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    affine = np.eye(4)
    affine[:3] = np.stack([row * first.spacing[1], column * first.spacing[0], step, corners[0]], axis=1)
    return Grid(
        frames=slices, affine=LPS_TO_RAS @ affine, spacing=first.spacing, tilt=0.0 if tilt < 0.1 else round(tilt, 2)
    )


def common_plane(source: object, frames: Sequence[Frame]) -> tuple[npt.NDArray[np.float64], ...]:
    """Unit vectors along a row, down a column and along the normal that all frames share, in LPS.

    Raises:
        UnreadableError: frames without geometry, or of different size, direction or pixel spacing.
    """
    first = frames[0]
    for frame in frames:
        if frame.position is None or frame.orientation is None or frame.spacing is None:
            raise UnreadableError(
                source,
                f"{frame.path.name} has no position, orientation or pixel spacing, so {len(frames)} frames make no "
                "volume; name single files if each is a picture of its own",
            )
        if frame.size != first.size:
            raise UnreadableError(
                source,
                f"frames of different size: {_size(first)} in {first.path.name}, {_size(frame)} in {frame.path.name}",
            )
        if np.abs(np.subtract(frame.orientation, first.orientation or ())).max() > _PARALLEL:
            raise UnreadableError(
                source,
                f"{first.path.name} and {frame.path.name} aren't parallel; a scout or radial series makes no volume",
            )
        if not np.allclose(frame.spacing, first.spacing or (), rtol=1e-3):
            raise UnreadableError(
                source, f"pixel spacing {first.spacing} in {first.path.name}, {frame.spacing} in {frame.path.name}"
            )
    assert first.orientation is not None
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(row, column)
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise UnreadableError(
            source, f"ImageOrientationPatient {list(first.orientation)} is no pair of perpendicular unit vectors"
        )
    return row, column, normal


def _size(frame: Frame) -> str:
    return f"{frame.size[0]} x {frame.size[1]}"


def _ordered(source: object, frames: Sequence[Frame], normal: npt.NDArray[np.float64]) -> tuple[tuple[Frame, ...], ...]:
    """Frames by place along the normal; those at one place by number."""
    depth = {frame.instance: float(np.dot(frame.position or (), normal)) for frame in frames}
    places: list[list[Frame]] = []
    for frame in sorted(frames, key=lambda f: depth[f.instance]):
        if places and depth[frame.instance] - depth[places[-1][0].instance] <= _SAME_PLACE_MM:
            places[-1].append(frame)
        else:
            places.append([frame])
    counts = [len(place) for place in places]
    if min(counts) != max(counts):
        odd = places[counts.index(min(counts))][0]
        raise UnreadableError(
            source,
            f"{max(counts)} frames at one place but {min(counts)} at another ({odd.path.name}): an incomplete series "
            "of time points, or two volumes in one series; complete or part them",
        )
    return tuple(tuple(sorted(place, key=lambda f: (f.number, f.path.name))) for place in places)


def _require_even(source: object, slices: Sequence[Sequence[Frame]], depth: npt.NDArray[np.float64]) -> None:
    steps = np.diff(depth)
    usual = float(np.median(steps))
    worst = int(np.abs(steps - usual).argmax())
    if abs(steps[worst] - usual) <= _EVEN * usual + _SAME_PLACE_MM:
        return
    between = f"between {slices[worst][0].path.name} and {slices[worst + 1][0].path.name}"
    times = steps[worst] / usual
    if times > 1.5 and abs(times - round(times)) < 0.1:
        missing = sum(round(float(s) / usual) - 1 for s in steps if s > 1.5 * usual)
        raise UnreadableError(
            source,
            f"{missing} of {len(slices) + missing} slices missing, the widest gap {between}; fetch the series again",
        )
    raise UnreadableError(
        source,
        f"slices are unevenly spaced: {steps[worst]:.3f} mm {between}, {usual:.3f} mm elsewhere; resample it to an "
        "even NIfTI volume",
    )
