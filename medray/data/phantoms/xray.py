"""X-ray-like phantoms: frontal chest radiographs as line integrals through a parametric thorax.

Path lengths in cm times attenuation give a transmission; photons are counted (Poisson), a share of scatter is added,
and the negative logarithm is written as 12-bit grey values, dense tissue bright.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medray.data.phantoms.base import Array, Rendered, Scanner, axes, blurred, cover, radius, smooth_field

SOFT, BONE = 0.19, 0.45  # linear attenuation at about 70 keV effective, 1/cm


def _chord(grids: list[Array], centre: tuple[float, float], semi: tuple[float, float], depth: float) -> Array:
    """Path length through an ellipsoid seen from the front, cm; ``depth`` is its full extent along the beam."""
    return depth * np.sqrt(np.clip(1 - radius(grids, centre, semi) ** 2, 0, None))


@dataclass
class _Thorax:
    """Maps (H, W): thickness of body, air and bone in cm, and share of lung. Rows v run down, columns u right."""

    body: Array
    air: Array
    bone: Array
    lung: Array


def _thorax(
    patient: np.random.Generator, image: np.random.Generator, shape: tuple[int, ...], big_heart: bool
) -> _Thorax:
    v, u = grids = axes(shape, (2.0, 2.0))
    pixel = 2.0 / shape[1]
    wide, high = patient.uniform(0.92, 1.05), patient.uniform(0.92, 1.05)
    soft = patient.uniform(17, 23) * np.sqrt(np.clip(1 - (np.abs(u) / (1.02 * wide)) ** 4, 0, 1))
    soft = soft * (0.55 + 0.45 / (1 + np.exp(-(v + 0.72) * 14)))  # neck and shoulders thin out at the top
    shoulder = _chord(grids, (-0.75, -0.85 * wide), (0.3, 0.4), 10) + _chord(
        grids, (-0.75, 0.85 * wide), (0.3, 0.4), 10
    )
    soft = np.maximum(soft, shoulder)

    dome = {-1: image.normal(0.52, 0.03), 1: image.normal(0.58, 0.03)}  # image left is the patient's right: higher dome
    lung = np.zeros(shape, np.float32)
    for side in (-1, 1):
        centre = side * 0.43 * wide
        outline = radius([v, u], (0.02, centre), (0.80 * high, 0.345 * wide)) + 0.06 * (v + 0.3) * side * np.sign(u)
        below = dome[side] + 2.2 * (u - centre) ** 2
        inside = cover((outline - 1) * 0.35, pixel) * cover(v - below * high, pixel)
        lung = np.maximum(lung, inside)
    air = 11.5 * lung

    ratio = image.uniform(0.57, 0.68) if big_heart else image.uniform(0.38, 0.47)
    half = ratio * 0.78 * wide
    heart = _chord(grids, (0.30, 0.10 + 0.25 * (half - 0.3)), (0.36, half), 9.5)
    aorta = _chord(grids, (-0.25, 0.09), (0.14, 0.10), 5)
    middle = 8.5 * np.exp(-((u / 0.13) ** 4)) * cover(-0.9 - v, 0.2) + 0 * v
    air = air - np.maximum(np.maximum(heart, aorta), middle) * lung
    for side in (-1, 1):  # hilar vessels fan out
        hilum = np.array([0.0, side * 0.17])
        for _ in range(9):
            angle = image.uniform(-1.15, 1.15)
            way = np.array([np.sin(angle), side * np.cos(angle)])
            along = (v - hilum[0]) * way[0] + (u - hilum[1]) * way[1]
            across = np.abs((v - hilum[0]) * way[1] - (u - hilum[1]) * way[0])
            taper = 0.030 * np.clip(1 - along / image.uniform(0.35, 0.6), 0, 1)
            air = air - 34 * np.sqrt(np.clip(taper**2 - across**2, 0, None)) * (along > 0) * lung

    bone = np.zeros(shape, np.float32)
    vertebrae = 1 - 0.35 * (np.cos(v * 2 * np.pi / 0.17) < -0.75)
    bone = bone + 2.4 * np.sqrt(np.clip(1 - (u / 0.085) ** 2, 0, 1)) * vertebrae
    gap, slope = patient.uniform(0.165, 0.185), patient.uniform(0.28, 0.42)
    for k in range(9):
        top = -0.86 * high + k * gap
        reach = np.sqrt(np.clip(1 - ((top + 0.25) / 1.15) ** 2, 0.15, 1)) * 0.86 * wide
        far = np.abs(u) / reach
        posterior = top + slope * far**2 * 0.55
        thick = np.clip(1 - (np.abs(v - posterior) / 0.033) ** 2, 0, 1)
        bone = bone + (1.0 * np.sqrt(thick) + 0.5 * (thick > 0) * (thick < 0.5)) * (far < 1) * (far > 0.1)
        anterior = top + 0.48 - 0.30 * far**2 + 0.12 * far
        thick = np.clip(1 - (np.abs(v - anterior) / 0.036) ** 2, 0, 1)
        bone = bone + 0.6 * np.sqrt(thick) * (far < 1) * (far > 0.45)
    for side in (-1, 1):
        clavicle = -0.70 * high - 0.10 * np.abs(u) / wide + 0.05 * np.sin(side * u * 6)
        thick = np.clip(1 - (np.abs(v - clavicle) / 0.035) ** 2, 0, 1)
        bone = bone + 0.8 * np.sqrt(thick) * (side * u > 0.08) * (side * u < 0.72 * wide)
    return _Thorax(body=soft.astype(np.float32), air=air.astype(np.float32), bone=bone.astype(np.float32), lung=lung)


def _nodule(image: np.random.Generator, grids: list[Array], lung: Array, contrast: float) -> Array:
    """Air that one round opacity inside a lung displaces, cm."""
    v, u = grids
    side = float(image.choice([-1, 1]))
    lowest = 0.35 if side < 0 else -0.05  # the heart hides what lies lower on its side
    centre = (image.uniform(-0.5, lowest), side * image.uniform(0.28, 0.58))
    size = image.uniform(0.085, 0.14)
    semi = (size * image.uniform(0.85, 1.15), size * image.uniform(0.85, 1.15))
    return contrast * _chord([v, u], centre, semi, 45 * size) * np.clip(lung * 2, 0, 1)


def _effusion(image: np.random.Generator, grids: list[Array], heights: tuple[float, float] = (0.05, 0.34)) -> Array:
    """Share of the air that pleural fluid displaces: one base, its meniscus rising to the side.

    ``heights``: from where to where the level may lie, on the axis from -1 at the top to 1.
    """
    v, u = grids
    side = float(image.choice([-1, 1]))
    level = image.uniform(*heights)
    meniscus = level - 0.9 * np.clip(side * u - 0.45, 0, None) ** 1.5 * 1.6
    return image.uniform(0.8, 0.97) * cover(meniscus - v, 0.12) * (side * u > 0.04)


def _expose(image: np.random.Generator, scanner: Scanner, thorax: _Thorax) -> Array:
    """Attenuation maps to a 12-bit radiograph (1, H, W)."""
    shape = thorax.body.shape
    soft = thorax.body - np.clip(thorax.air, 0, None)
    soft = np.clip(soft + 0.25 * smooth_field(image, shape, 12), 0.5, None)
    transmission = np.exp(-SOFT * soft - (BONE - SOFT) * thorax.bone)
    scatter = 0.35 * blurred(transmission, shape[0] / 9)
    primary = blurred(transmission, 0.45 * scanner.blur)
    photons = scanner.gain / (scanner.noise**2)
    counts = image.poisson(photons * (primary + scatter)) + 1.0
    density = -np.log(counts / photons).astype(np.float32)
    low, high = 0.2, 5.2
    return np.clip(np.rint((density - low) / (high - low) * 4095), 0, 4095)[None].astype(np.float32)


def render_nodule_film(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    flags: tuple[int, ...],
) -> Rendered:
    """Chest film; flags: normal, nodule. ``scanner.noise`` is the relative noise of one open-field pixel."""
    thorax = _thorax(patient, image, shape, big_heart=False)
    if flags[1]:
        thorax.air -= _nodule(image, axes(shape, (2.0, 2.0)), thorax.lung, scanner.contrast)
    return Rendered(array=_expose(image, scanner, thorax))


def render_findings_film(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    flags: tuple[int, ...],
) -> Rendered:
    """Chest film; flags: cardiomegaly, effusion, nodule, in any combination."""
    heart, fluid, nodule = flags
    thorax = _thorax(patient, image, shape, big_heart=bool(heart))
    grids = axes(shape, (2.0, 2.0))
    if nodule:
        thorax.air -= _nodule(image, grids, thorax.lung, scanner.contrast)
    if fluid:
        thorax.air *= 1 - _effusion(image, grids)
    return Rendered(array=_expose(image, scanner, thorax))


GRADES = ((0.36, 0.44), (0.14, 0.24), (-0.2, -0.05))
"""Levels of a small, a moderate and a large effusion."""


def render_effusion_film(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    flags: tuple[int, ...],
) -> Rendered:
    """Chest film; flags: no effusion, a small, a moderate, a large one."""
    thorax = _thorax(patient, image, shape, big_heart=False)
    grade = flags.index(1)
    if grade:
        thorax.air *= 1 - _effusion(image, axes(shape, (2.0, 2.0)), GRADES[grade - 1])
    return Rendered(array=_expose(image, scanner, thorax))
