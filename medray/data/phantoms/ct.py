"""CT-like phantoms in Hounsfield units: an abdomen with liver lesions, and lung nodules by type.

Noise follows filtered back projection: its power rises with spatial frequency in the axial plane, then falls with the
reconstruction kernel (Riederer, Pelc and Chesler 1978), and is uncorrelated between slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.data.phantoms.base import (
    Array,
    Rendered,
    Scanner,
    axes,
    ball,
    blend,
    cover,
    pick,
    radius,
    smooth_field,
)

AIR, FAT, MUSCLE, LUNG = -1000.0, -100.0, 50.0, -840.0


def reconstruction_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float, kernel: float) -> Array:
    """Noise of ``sigma`` HU over (X, Y, Z) with a ramp spectrum that ends at about ``kernel`` cycles a voxel."""
    white = rng.standard_normal(shape).astype(np.float32)
    fx = np.fft.fftfreq(shape[0])[:, None, None]
    fy = np.fft.rfftfreq(shape[1])[None, :, None]
    f = np.sqrt(fx**2 + fy**2)
    response = np.sqrt(f + 0.02) * np.exp(-((f / kernel) ** 2))
    spectrum = np.fft.rfftn(white, axes=(0, 1)) * response
    noise = np.fft.irfftn(spectrum, s=shape[:2], axes=(0, 1)).astype(np.float32)
    return noise * np.float32(sigma / noise.std())


def _from_line(grids: Sequence[Array], at: npt.NDArray[Any], way: npt.NDArray[Any]) -> tuple[Array, Array]:
    """Of each voxel, mm along a line through ``at`` in the direction ``way`` (of length 1), and from it."""
    along = sum((g - c) * k for g, c, k in zip(grids, at, way, strict=True))
    across = np.sqrt(np.maximum(sum((g - c) ** 2 for g, c in zip(grids, at, strict=True)) - along**2, 0))
    return along, across


def render_abdomen(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    _flags: tuple[int, ...],
) -> Rendered:
    """Upper abdomen in the portal venous phase. Labels: 1 liver, 2 lesion. ``scanner.noise`` in HU."""
    extent = (340.0, 270.0, 180.0)
    spacing = tuple(e / n for e, n in zip(extent, shape, strict=True))
    grids = axes(shape, extent)
    x, y, z = grids
    width = scanner.blur * spacing[0]
    size = patient.uniform(0.9, 1.08)

    def jitter(*at: float) -> tuple[float, ...]:
        return tuple(size * a + patient.normal(0, 4) for a in at)

    hu: Array = np.full(shape, AIR, np.float32)
    couch = cover(np.abs(y + 122 - (x / 150) ** 2 * 22) - 3, width) * (np.abs(x) < 150)
    hu = blend(hu, couch, -150.0)
    semi = np.array([155.0, 108.0]) * size
    torso = radius([x, y], (0, 0), semi) - 0.03 * np.cos(2 * np.arctan2(y, x))
    torso = np.broadcast_to(torso, shape)
    fat = patient.uniform(0.06, 0.16)
    hu = blend(hu, cover((torso - 1) * semi[1], width), FAT)
    hu = blend(hu, cover((torso - 1 + fat) * semi[1], width), MUSCLE)
    inner = cover((torso - 1 + fat + 0.13) * semi[1], width)
    hu = blend(hu, inner, FAT + 25 * smooth_field(patient, shape, 6))

    # Ribs: spots on the wall that wander down from the spine to the front.
    angle = np.arctan2(x, -y)
    rib = np.cos((z + 45 * np.abs(angle)) * (2 * np.pi / 34)) - 0.35
    wall = cover((np.abs(torso - 1 + fat + 0.065) - 0.035) * semi[1], width)
    hu = blend(hu, wall * np.clip(rib * 3, 0, 1) * (np.abs(angle) < 2.3), 420.0)

    for side in (-1, 1):
        lung = ball(grids, jitter(side * 70, -5, 105), (62, 78, 75), width)
        hu = blend(hu, lung * inner, LUNG)
    hu = blend(hu, ball(grids, jitter(-95, -28, 25), (32, 45, 42), width) * inner, 115.0)
    stomach = ball(grids, jitter(-58, 42, 18), (40, 32, 40), width) * inner
    hu = blend(hu, stomach, np.where(y > 52 * size, -900.0, 25.0).astype(np.float32))
    for side in (-1, 1):
        centre, axes_mm = jitter(side * 60, -48, -45), (27, 24, 48)
        hu = blend(hu, ball(grids, centre, axes_mm, width) * inner, 185.0)
        hu = blend(hu, ball(grids, (centre[0] - side * 12, centre[1], centre[2]), (11, 10, 25), width), -60.0)
    for _ in range(9):
        middle = (patient.uniform(-80, 80), patient.uniform(-5, 65), patient.uniform(-95, -25))
        bowel = ball(grids, middle, patient.uniform(12, 24, 3), width) * inner
        hu = blend(hu, bowel, float(patient.choice([35.0, 60.0, -750.0], p=[0.5, 0.3, 0.2])))

    wobble = 0.09 * smooth_field(patient, shape, 3)
    right, left = jitter(72, 8, 15), jitter(15, 40, 28)
    lobes = np.minimum(radius(grids, right, (64, 74, 68)), radius(grids, left, (66, 34, 34))) - 1 - wobble
    liver = cover(lobes * 50, width) * inner
    parenchyma = patient.uniform(95, 125)
    texture = smooth_field(image, shape, (14, 12, 10))
    hu = blend(hu, liver, parenchyma + 4 * texture)
    for _ in range(5):  # portal and hepatic veins: bright tubes, the lesions' opposite
        a = np.array(right) + patient.normal(0, 18, 3)
        d = patient.normal(0, 1, 3)
        d /= np.linalg.norm(d)
        along, across = _from_line(grids, a, d)
        hu = blend(hu, cover(across - 3.5, width) * (np.abs(along) < 45) * liver, parenchyma + 60)

    spine = radius([x, y], (0, -62 * size), (21, 18))
    disc = (np.cos(z * (2 * np.pi / 36)) > -0.8).astype(np.float32)
    hu = blend(hu, np.broadcast_to(cover((spine - 1) * 18, width), shape), 480 * disc + 90 * (1 - disc))
    hu = blend(hu, np.broadcast_to(cover((spine - 0.75) * 18, width), shape), 230 * disc + 90 * (1 - disc))
    hu = blend(hu, np.broadcast_to(ball([x, y], (0, -88 * size), (10, 8), width), shape), 35.0)
    hu = blend(hu, np.broadcast_to(ball([x, y], (-12 * size, -32 * size), (11, 11), width), shape), 190.0)
    hu = blend(hu, np.broadcast_to(ball([x, y], (22 * size, -28 * size), (13, 10), width), shape), 150.0)

    lesions: Array = np.zeros(shape, np.float32)
    for _ in range(int(image.choice([0, 1, 2, 3, 4], p=[0.06, 0.3, 0.3, 0.2, 0.14]))):
        at = pick(image, (lobes < -0.22) & (liver > 0.99))
        if at is None:
            break
        core = [float(g.ravel()[i]) for g, i in zip(grids, at, strict=True)]
        size_mm = image.uniform(15, 32) * image.uniform(0.85, 1.15, 3)
        lesion = ball(grids, core, size_mm, width, 0.16 * smooth_field(image, shape, 7)) * liver
        depth = scanner.contrast * image.uniform(55, 95)
        rim = ball(grids, core, size_mm * 1.2, width) * liver - lesion
        hu = hu + np.clip(rim, 0, 1) * (14 if image.random() < 0.5 else 0)
        hu = blend(hu, lesion, parenchyma - depth + 5 * texture)
        lesions = np.maximum(lesions, lesion)

    hu = hu + reconstruction_noise(image, shape, scanner.noise, 0.38 / scanner.blur)
    mask = np.where(lesions > 0.5, 2, np.where(liver > 0.5, 1, 0)).astype(np.uint8)
    return Rendered(array=np.clip(np.rint(hu), -1024, 3071)[None].astype(np.float32), mask=mask, spacing=spacing)


def render_nodule(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    flags: tuple[int, ...],
) -> Rendered:
    """A cube of lung around a nodule. Flags: solid, part-solid, ground-glass. ``scanner.noise`` in HU."""
    extent = (40.0, 40.0, 40.0)
    spacing = tuple(e / n for e, n in zip(extent, shape, strict=True))
    grids = axes(shape, extent)
    width = scanner.blur * spacing[0]
    lung = patient.uniform(-880, -800)
    hu = lung + 18 * smooth_field(image, shape, 9)
    if image.random() < 0.45:  # the chest wall on one side
        normal = image.normal(0, 1, 3) * (1, 1, 0.3)
        normal /= np.linalg.norm(normal)
        depth = sum(g * k for g, k in zip(grids, normal, strict=True))
        wall = cover(image.uniform(13, 17) - depth + 0.8 * smooth_field(image, shape, 3), width)
        hu = blend(hu, wall, MUSCLE)
    for _ in range(int(image.integers(3, 8))):  # vessels
        start = image.uniform(-16, 16, 3)
        way = image.normal(0, 1, 3)
        way /= np.linalg.norm(way)
        _, across = _from_line(grids, start, way)
        hu = blend(hu, cover(across - image.uniform(0.5, 1.5), width), 40.0)

    centre = image.normal(0, 2.0, 3)
    semi = image.uniform(4.0, 9.0) * image.uniform(0.85, 1.15, 3)
    wobble = 0.12 * smooth_field(image, shape, 5)
    solid, part, _ = flags
    body = ball(grids, centre, semi, width, wobble)
    glass = image.uniform(-650, -480) + 35 * smooth_field(image, shape, 8)
    core = semi * (1.0 if solid else image.uniform(0.4, 0.6))
    hu = blend(hu, body, np.maximum(hu, glass))
    if solid or part:
        offset = centre if solid else centre + image.normal(0, 0.12, 3) * semi
        hu = blend(hu, ball(grids, offset, core, width, wobble), image.uniform(10, 60))
    hu = hu + reconstruction_noise(image, shape, scanner.noise, 0.38 / scanner.blur)
    return Rendered(array=np.clip(np.rint(hu), -1024, 3071)[None].astype(np.float32), spacing=spacing)
