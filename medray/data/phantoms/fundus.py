"""Fundus-like phantoms: colour photographs of a retina with vessels, or with haemorrhages and exudates.

Drawn as relative reflectance, lit unevenly, seen through the camera's point spread; then photon noise and 8 bit.
"""

from __future__ import annotations

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw

from medray.data.phantoms.base import (
    Array,
    Labels,
    Rendered,
    Scanner,
    axes,
    ball,
    blend,
    blurred,
    cover,
    pick,
    radius,
    smooth_field,
)

_OVERSAMPLE = 4


def _edge(distance: Array) -> Array:
    """1 inside, 0 outside, with the gradual border of a disc."""
    return 0.5 - 0.5 * np.tanh(7 * distance)


def _tree(
    patient: np.random.Generator, shape: tuple[int, ...], disc: tuple[float, float], side: float
) -> tuple[Array, Array]:
    """Coverage of veins and arteries (H, W): arcades that leave the disc, arch round the macula and branch.

    ``disc`` is (v, u) in -1..1, ``side`` is the sign of the direction from disc to macula.
    """
    height, width = (n * _OVERSAMPLE for n in shape)
    layers = []
    for thick in (0.030, 0.022):  # veins, arteries
        canvas = Picture.new("L", (width, height), 0)
        pen = ImageDraw.Draw(canvas)
        stack = []
        for up in (-1.0, 1.0):
            stack.append((disc[0], disc[1], np.arctan2(up, 0.55 * side) + patient.normal(0, 0.10), thick, up, 0))
            stack.append(
                (disc[0], disc[1], np.arctan2(up, -0.75 * side) + patient.normal(0, 0.2), thick * 0.75, 0.0, 0)
            )
        while stack:
            v, u, heading, w, arch, level = stack.pop()
            step = 0.04
            since = 0
            while v * v + u * u < 1.0 and w > 0.0055:
                # The arcades bend back towards the horizontal as they pass the macula.
                heading += patient.normal(0, 0.09)
                if level == 0 and arch:
                    goal = 0.0 if side > 0 else np.pi
                    heading += 0.10 * np.sin(goal - heading)
                v2, u2 = v + step * np.sin(heading), u + step * np.cos(heading)
                ends = [((a + 1) / 2 * width, (b + 1) / 2 * height) for a, b in ((u, v), (u2, v2))]
                pen.line(ends, fill=255, width=max(1, round(w * width / 2)))
                v, u, w, since = v2, u2, w * 0.985, since + 1
                if since > 3 and patient.random() < 0.20 and len(stack) < 40:
                    turn = patient.choice([-1, 1]) * patient.uniform(0.45, 0.95)
                    stack.append((v, u, heading + turn, w * patient.uniform(0.55, 0.75), 0.0, level + 1))
                    w, since = w * 0.93, 0
        small = np.asarray(canvas, np.float32).reshape(shape[0], _OVERSAMPLE, shape[1], _OVERSAMPLE).mean((1, 3)) / 255
        layers.append(small)
    return layers[0], layers[1]


def _retina(
    patient: np.random.Generator, scanner: Scanner, shape: tuple[int, ...]
) -> tuple[Array, Array, Labels, Array]:
    """(reflectance (3, H, W), vessel coverage, field of view, distance from macula and disc for placing lesions)."""
    grids = axes(shape, (2.1, 2.1))
    pixel = 2.1 / shape[0]
    side = 1.0 if patient.random() < 0.5 else -1.0  # left or right eye
    disc = (float(patient.normal(0, 0.04)), float(-side * patient.uniform(0.42, 0.56)))
    macula = (disc[0] + 0.06, disc[1] + side * 0.55)
    base = np.array([0.80, 0.40, 0.17]) * patient.uniform([0.9, 0.75, 0.6], [1.1, 1.0, 1.2])
    fov = np.broadcast_to(cover(radius(grids, (0, 0), (1, 1)) - 0.97, pixel), shape)
    pigment = 1 + 0.05 * smooth_field(patient, shape, 5) + 0.03 * smooth_field(patient, shape, 14)
    rgb: Array = base[:, None, None].astype(np.float32) * pigment
    dark = np.exp(-((radius(grids, macula, (0.22, 0.22))) ** 2))
    rgb = rgb * (1 - dark * np.array([0.35, 0.5, 0.45], np.float32)[:, None, None])
    disc_r = radius(grids, disc, (0.155, 0.14))
    rgb = blend(rgb, _edge(disc_r - 1), np.array([1.02, 0.78, 0.45], np.float32)[:, None, None])
    cup = _edge(disc_r - patient.uniform(0.35, 0.6))
    rgb = blend(rgb, 0.8 * cup, np.array([1.08, 0.95, 0.68], np.float32)[:, None, None])
    veins, arteries = _tree(patient, shape, disc, side)
    absorb = np.array([0.25, 0.55, 0.35], np.float32)[:, None, None] * scanner.contrast
    rgb = rgb * (1 - absorb * veins) * (1 - 0.75 * absorb * arteries)
    vessels = np.maximum(veins, arteries) * fov
    places = np.minimum(disc_r * 0.14, radius(grids, macula, (1, 1)))
    return (
        rgb.astype(np.float32),
        vessels,
        (fov > 0.5).astype(np.uint8),
        np.where(fov > 0.99, places, 0.0).astype(np.float32),
    )


def _photograph(image: np.random.Generator, scanner: Scanner, rgb: Array, fov: Labels) -> Array:
    """Uneven light, point spread, noise, 8 bit. ``scanner.noise`` in grey values at full brightness."""
    shape = rgb.shape[1:]
    v, u = axes(shape, (2.1, 2.1))
    light = 1.05 - 0.35 * ((v - image.normal(0, 0.2)) ** 2 + (u - image.normal(0, 0.2)) ** 2)
    light = np.clip(light + 0.06 * smooth_field(image, shape, 2), 0.15, None) * scanner.gain
    tint = image.normal(1, 0.04, 3).astype(np.float32)[:, None, None]
    grey = blurred(rgb * light * tint, 0.5 * scanner.blur, first=1) * 205 * fov
    noise = scanner.noise * np.sqrt(np.clip(grey, 4, None) / 200) * image.standard_normal(rgb.shape)
    return np.clip(np.rint(grey + noise), 0, 255).astype(np.float32)


def render_vessels(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    _flags: tuple[int, ...],
) -> Rendered:
    """Retina; label 1 is vessel; ``valid`` is the field of view."""
    rgb, vessels, fov, _ = _retina(patient, scanner, shape)
    mask = ((vessels > 0.4) & (fov > 0)).astype(np.uint8)
    return Rendered(array=_photograph(image, scanner, rgb, fov), mask=mask, valid=fov)


def render_lesions(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    _flags: tuple[int, ...],
) -> Rendered:
    """Diabetic retina; labels: 1 haemorrhage (dark red), 2 exudate (bright yellow)."""
    rgb, _, fov, places = _retina(patient, scanner, shape)
    grids = axes(shape, (2.1, 2.1))
    pixel = 2.1 / shape[0]
    marks = np.zeros(shape, np.uint8)
    looks = {1: ((0.42, 0.10, 0.07), (0.045, 0.13), 5), 2: ((1.0, 0.86, 0.42), (0.035, 0.10), 6)}
    for value, (colour, sizes, most) in looks.items():
        for _ in range(int(image.integers(0, most + 1))):
            at = pick(image, (places > 0.17) & (marks == 0))
            if at is None:
                break
            centre = [float(g.ravel()[i]) for g, i in zip(grids, at, strict=True)]
            semi = image.uniform(*sizes) * image.uniform(0.7, 1.3, 2)
            spot = ball(grids, centre, semi, pixel, 0.25 * smooth_field(image, shape, 14)) * fov
            strength = np.clip(scanner.contrast * image.uniform(0.55, 0.95), 0, 1)
            rgb = blend(rgb, strength * spot, np.array(colour, np.float32)[:, None, None])
            marks = np.where(spot > 0.5, np.uint8(value), marks)
    return Rendered(array=_photograph(image, scanner, rgb, fov), mask=marks)
