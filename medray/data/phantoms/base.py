"""What all phantoms share: their description, their scanners, and the drawing of soft shapes and smooth fields.

Only numpy is needed. Everything is drawn in continuous coordinates with edges as wide as the scanner's point spread, so
that a phantom looks alike at any matrix size and partial volume comes for free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.data.image import Modality

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One site's machine.

    Attributes:
        site: its name in the manifest.
        noise: standard deviation of the noise, in the modality's own unit (see each phantom).
        blur: width of the point spread, in pixels or voxels.
        contrast: factor on the lesion's contrast.
        gain: factor on the signal (MR, fundus) or the tube's exposure (X-ray); 1 elsewhere.
        matrix: factors on the number of voxels per axis, at the same field of view.
    """

    site: str
    noise: float
    blur: float = 1.0
    contrast: float = 1.0
    gain: float = 1.0
    matrix: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A phantom before it becomes an Image: (C, *spatial) array, (*spatial) masks, mm per axis."""

    array: Array
    mask: Labels | None = None
    valid: Labels | None = None
    spacing: tuple[float, ...] | None = None


Render = Callable[
    [np.random.Generator, np.random.Generator, Scanner, tuple[int, ...], tuple[int, ...]],
    Rendered,
]
"""(patient's generator, image's generator, scanner, shape, label flags) to pixels.

``label flags`` hold a 0/1 per class that the image shall show (one-hot where it has one class, empty with a mask)."""


@dataclass(frozen=True, kw_only=True)
class PhantomSpec:
    """A family of phantoms.

    Attributes:
        size: default shape; a scanner's ``matrix`` scales it.
        cases: how many a manifest has when none are asked for.
        has_valid: whether the image has a field of view outside which nothing counts.
    """

    name: str
    description: str
    task: str
    modality: Modality
    channels: int
    classes: tuple[str, ...]
    size: tuple[int, ...]
    cases: int
    scanners: tuple[Scanner, ...]
    render: Render
    has_valid: bool = False

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.size)


def axes(shape: tuple[int, ...], extent: tuple[float, ...]) -> list[Array]:
    """Open coordinate grids of the pixel centres over a field of view of ``extent`` (any unit), 0 in the middle."""
    grids = []
    for axis, (n, width) in enumerate(zip(shape, extent, strict=True)):
        line = ((np.arange(n) + 0.5) / n - 0.5) * width
        grids.append(line.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))]))
    return grids


def radius(grids: list[Array], centre: Any, semi: Any) -> Array:
    """Normalised distance from an ellipsoid's centre: 1 on its surface."""
    single = np.float32  # NumPy's own double scalars would widen everything that follows
    squares = [
        ((g - np.asarray(c, single)) / np.asarray(a, single)) ** 2 for g, c, a in zip(grids, centre, semi, strict=True)
    ]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    return np.sqrt(total)


def cover(distance: Array, width: float) -> Array:
    """Share of a pixel inside a shape whose signed ``distance`` (negative inside) is in the unit of ``width``."""
    return np.clip(0.5 - distance / max(width, 1e-6), 0.0, 1.0)


def ball(grids: list[Array], centre: Any, semi: Any, width: float, wobble: Array | float = 0.0) -> Array:
    """Coverage of an ellipsoid whose surface is displaced by ``wobble`` (a share of its size)."""
    return cover((radius(grids, centre, semi) - 1.0 - wobble) * float(np.min(semi)), width)


def blend(canvas: Array, coverage: Array, value: Array | float) -> Array:
    """Paint ``value`` over ``canvas`` where ``coverage`` is 1."""
    return canvas + coverage * (value - canvas)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], cells: tuple[float, ...] | float) -> Array:
    """Gaussian random field with about ``cells`` bumps along each axis, mean 0 and standard deviation 1.

    White noise on a coarse grid, spread by a separable Gaussian kernel: a few matrix products, whatever the shape.
    """
    counts = cells if isinstance(cells, tuple) else (cells,) * len(shape)
    knots = [max(2, round(c)) + 2 for c in counts]
    field = rng.standard_normal(knots).astype(np.float32)
    for axis, (n, k) in enumerate(zip(shape, knots, strict=True)):
        at = np.linspace(0.5, k - 1.5, n)[:, None]
        weights = np.exp(-0.5 * ((at - np.arange(k)) / 0.7) ** 2)
        weights /= np.sqrt((weights**2).sum(1, keepdims=True))
        field = np.moveaxis(np.tensordot(weights.astype(np.float32), field, axes=(1, axis)), 0, axis)
    return field.astype(np.float32)


def blurred(image: Array, sigma: float, first: int = 0) -> Array:
    """Gaussian blur by ``sigma`` pixels along the axes from ``first`` on (a matrix product each)."""
    if sigma <= 0.05:
        return image
    for axis in range(first, image.ndim):
        n = image.shape[axis]
        place = np.arange(n)
        weights = np.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights.astype(np.float32), image, axes=(1, axis)), 0, axis)
    return image.astype(np.float32)


def pick(rng: np.random.Generator, where: npt.NDArray[np.bool_]) -> tuple[int, ...] | None:
    """A random index at which ``where`` holds; None if there is none."""
    places = np.flatnonzero(where)
    if not len(places):
        return None
    return tuple(int(i) for i in np.unravel_index(int(rng.choice(places)), where.shape))
