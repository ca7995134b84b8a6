"""MONAI's way to training batches, the peer of `loader`: our preprocessing and augmentation in MONAI's own terms.

Ranges and probabilities are ours, as far as MONAI's transforms can express them; what it caches is everything before
the first random transform, as its documentation advises.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medray.config.schema import Experiment
from medray.data import augment
from medray.data.manifest import Manifest


def loader(
    kind: str, manifest: Manifest, experiment: Experiment, patch: Sequence[int], workers: int, folder: Path
) -> Any:
    """A DataLoader over MONAI's ``CacheDataset`` or ``PersistentDataset``; the former's cache is filled here."""
    from monai.data import CacheDataset, DataLoader, PersistentDataset

    warnings.filterwarnings("ignore")  # deprecations within MONAI
    logging.getLogger("monai").setLevel(logging.ERROR)
    files, chain = _files(manifest), _transforms(manifest, experiment, patch)
    if kind == "CacheDataset":
        dataset = CacheDataset(files, chain, num_workers=max(1, workers), progress=False)
    else:
        dataset = PersistentDataset(files, chain, cache_dir=folder)
    return DataLoader(
        dataset,
        batch_size=experiment.train.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,  # Linux's own, which shares the cache
    )


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    root = Path(manifest.root)
    found = []
    for case in manifest.cases:
        target = {"mask": str(root / case.mask)} if case.mask else {"label": case.label}
        found.append({"image": str(root / case.images[0]), **target})
    return found


def _transforms(manifest: Manifest, experiment: Experiment, patch: Sequence[int]) -> Any:
    from monai import transforms as mt

    prepare, masked = experiment.preprocess, manifest.task == "segmentation"
    keys = ["image", "mask"] if masked else ["image"]
    steps: list[Any] = [mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys)]
    if manifest.ndim == 3:
        steps.append(mt.Orientationd(keys, axcodes="RAS"))
    if prepare.spacing is not None:
        steps.append(mt.Spacingd(keys, pixdim=prepare.spacing, mode=_modes(masked, "bilinear")))
    if prepare.size is not None:
        steps.append(mt.Resized(keys, spatial_size=prepare.size, mode="area" if not masked else ("area", "nearest")))
    steps += [mt.NormalizeIntensityd("image", channel_wise=True), mt.SpatialPadd(keys, spatial_size=patch)]
    steps.append(mt.EnsureTyped(keys, track_meta=False))
    return mt.Compose([*steps, *_random(experiment, keys, patch, ndim=manifest.ndim)])


def _modes(masked: bool, image: str) -> Any:
    return (image, "nearest") if masked else image


def _random(experiment: Experiment, keys: list[str], patch: Sequence[int], *, ndim: int) -> list[Any]:
    """The default augmentation, in our order: geometry, field and contrast, optics, sampling, noise."""
    from monai import transforms as mt

    config, masked = experiment.augment, "mask" in keys
    axes = 1 if ndim == 2 else 3
    geometry: Mapping[str, Any] = {
        "rotate_range": (math.radians(config.rotate_deg),) * axes,
        "shear_range": (math.tan(math.radians(config.shear_deg)),) * (2 if ndim == 2 else 6),
        "translate_range": tuple(config.translate * n for n in patch),
        "scale_range": ((config.scale[0] - 1, config.scale[1] - 1),) * ndim,
        "mode": _modes(masked, "bilinear"),
        "padding_mode": "border",
    }
    elastic = mt.Rand2DElasticd if ndim == 2 else mt.Rand3DElasticd
    how: Mapping[str, Any] = {"spacing": (20, 20)} if ndim == 2 else {"sigma_range": (5, 7)}
    blur = {f"sigma_{axis}": augment._BLUR for axis in "xyz"[:ndim]}
    contrast, gamma = augment._CONTRAST, augment._GAMMA
    steps = [
        (1.0, mt.RandSpatialCropd(keys, roi_size=patch, random_size=False)),
        (config.p_affine, mt.RandAffined(keys, prob=config.p_affine, **geometry)),
        (config.p_elastic, elastic(keys, prob=config.p_elastic, magnitude_range=(1, 3), spatial_size=patch, **how,
                                   mode=geometry["mode"], padding_mode="border")),
        (config.p_bias_field, mt.RandBiasFieldd("image", prob=config.p_bias_field,
                                                coeff_range=(-augment._BIAS, augment._BIAS))),
        (config.p_brightness, mt.RandShiftIntensityd("image", offsets=augment._BRIGHTNESS, prob=config.p_brightness)),
        (config.p_contrast, mt.RandScaleIntensityd("image", factors=contrast, prob=config.p_contrast)),
        (config.p_gamma, mt.RandAdjustContrastd("image", prob=config.p_gamma,
                                                gamma=(math.exp(-gamma), math.exp(gamma)))),
        (config.p_blur, mt.RandGaussianSmoothd("image", prob=config.p_blur, **blur)),
        (config.p_low_resolution, mt.RandSimulateLowResolutiond(
            "image", prob=config.p_low_resolution, zoom_range=(1 / (1 + augment._LOW_RESOLUTION), 1.0),
            upsample_mode="bilinear" if ndim == 2 else "trilinear")),
        (config.p_noise, mt.RandGaussianNoised("image", prob=config.p_noise, std=augment._NOISE)),
    ]  # fmt: skip
    return [step for p, step in steps if p > 0]
