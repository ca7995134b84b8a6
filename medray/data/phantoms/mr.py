"""MR-like phantoms: a FLAIR-weighted head with oedema and tumour core.

The receive coils' bias field multiplies the signal, and the magnitude of two noisy channels makes the noise Rician
(Gudbjartsson and Patz 1995). The unit is arbitrary, as on a real scanner: each has its own gain.
"""

from __future__ import annotations

import numpy as np

from medray.data.phantoms.base import Rendered, Scanner, axes, ball, blend, cover, pick, radius, smooth_field


def render_head(
    patient: np.random.Generator,
    image: np.random.Generator,
    scanner: Scanner,
    shape: tuple[int, ...],
    _flags: tuple[int, ...],
) -> Rendered:
    """FLAIR head. Labels: 1 oedema, 2 core. ``scanner.noise`` as a share of the white matter's signal."""
    extent = (176.0, 216.0, 160.0)
    spacing = tuple(e / n for e, n in zip(extent, shape, strict=True))
    grids = axes(shape, extent)
    x, y, z = grids
    width = scanner.blur * spacing[0]
    size = patient.uniform(0.92, 1.04)
    semi = np.array([73.0, 94.0, 84.0]) * size
    centre = (0.0, 0.0, -8.0)
    r = radius(grids, centre, semi) + 0.012 * smooth_field(patient, shape, 3)
    scale = float(semi[0])

    signal = np.full(shape, 0.015, np.float32)
    signal = blend(signal, cover((r - 1.0) * scale, width), patient.uniform(0.75, 0.95))  # scalp
    signal = blend(signal, cover((r - 0.94) * scale, width), 0.06)  # skull
    signal = blend(signal, cover((r - 0.885) * scale, width), 0.18)  # fluid, suppressed
    folds = smooth_field(patient, shape, (13, 15, 12))
    brain = cover((r - 0.85 - 0.018 * folds) * scale, width)
    signal = blend(signal, brain, 0.80)  # grey matter
    white = cover((r - 0.70 - 0.055 * folds) * scale, width)
    signal = blend(signal, white, 0.62 + 0.012 * smooth_field(patient, shape, 9))
    fissure = cover(np.abs(x + 0.8 * smooth_field(patient, (1, *shape[1:]), (1, 4, 4))) - 1.6, width)
    signal = blend(signal, fissure * brain * cover(6 - z, 12.0), 0.3)
    wide = patient.uniform(0.75, 1.3)
    ventricles = np.zeros(shape, np.float32)
    for side in (-1, 1):
        signal = blend(signal, ball(grids, (side * 13, -8, -12), (9, 15, 9), width), 0.76)  # thalamus
        horn = ball(grids, (side * (9 + 0.10 * np.abs(y + 5)), -4, 8), (7 * wide, 36, 10 * wide), width)
        ventricles = np.maximum(ventricles, horn)
        signal = blend(signal, ball(grids, (side * 22, 4, -6), (7, 16, 10), width), 0.74)  # putamen
    signal = blend(signal, ventricles, 0.12)

    oedema = np.zeros(shape, np.float32)
    cores = np.zeros(shape, np.float32)
    for _ in range(int(image.choice([0, 1, 2, 3], p=[0.05, 0.55, 0.28, 0.12]))):
        at = pick(image, (white > 0.9) & (r < 0.62) & (ventricles < 0.1))
        if at is None:
            break
        middle = [float(g.ravel()[i]) for g, i in zip(grids, at, strict=True)]
        semi_mm = image.uniform(14, 27) * image.uniform(0.8, 1.2, 3)
        ragged = 0.2 * smooth_field(image, shape, 8)
        swelling = ball(grids, middle, semi_mm, width, ragged) * brain * (1 - ventricles)
        contrast = scanner.contrast * image.uniform(0.32, 0.48)
        signal = blend(signal, swelling, 0.62 + contrast + 0.04 * smooth_field(image, shape, 8))
        core = ball(grids, middle, semi_mm * image.uniform(0.42, 0.6), width, 0.12 * smooth_field(image, shape, 6))
        core = core * swelling
        signal = blend(signal, core, 0.62 + 0.25 * contrast + 0.06 * smooth_field(image, shape, 10))
        signal = blend(signal, ball(grids, middle, semi_mm * 0.2, width) * core, 0.3)  # necrosis
        oedema, cores = np.maximum(oedema, swelling), np.maximum(cores, core)

    bias = np.exp(0.18 * smooth_field(image, shape, 1.5)).astype(np.float32)
    signal = signal * bias
    sigma = scanner.noise
    real = signal + sigma * image.standard_normal(shape).astype(np.float32)
    imaginary = sigma * image.standard_normal(shape).astype(np.float32)
    magnitude = np.hypot(real, imaginary) * 1000.0 * scanner.gain * patient.uniform(0.85, 1.15)
    mask = np.where(cores > 0.5, 2, np.where(oedema > 0.5, 1, 0)).astype(np.uint8)
    return Rendered(array=np.clip(np.rint(magnitude), 0, 32767)[None].astype(np.float32), mask=mask, spacing=spacing)
