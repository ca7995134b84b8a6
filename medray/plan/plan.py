"""Fingerprint (+ this machine) to Experiment: the strong default, trial 0.

The rules follow the self-configuration of nnU-Net (Isensee et al., Nature Methods 2021,
doi:10.1038/s41592-020-01008-z) where they fit: median spacing, percentile clipping for CT, patch as large as memory
allows, depth until the coarsest axis is short. Where that assumes GPU hours they differ: width and batch follow the
machine, and the schedule follows a budget in seconds.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from medray.config.schema import AugmentConfig, ModelConfig
from medray.data.fingerprint import Fingerprint
from medray.models.catalogue import lookup
from medray.models.spec import ModelSpec
from medray.plan.machine import Machine
from medray.tasks.catalogue import find_task

Tree = dict[str, Any]

SMALL_IMAGE = 64
"""Up to this many pixels an axis, a classifier keeps the image's own size and a stem without striding."""

VOXELS_3D = {"cpu": 80_000, "cuda": 128**3}
PIXELS_2D = {"cpu": 192 * 192, "cuda": 512 * 512}
"""The largest patch, in voxels: on CPUs what gives hundreds of steps in minutes, on GPUs what fills the memory."""

OWN_FAMILY = "U-Net"
"""The networks whose width and learning rate were found on CPUs and GPUs by measurement; others keep their own."""

WIDTH, NARROW = 32, 16
"""Of a U-Net's first level. Multiples of 16, the channels that a CPU's kernels take at once: a step of width 24 costs
2.5 times one of 16, and 32 hardly more than 24."""
CHECKPOINTED = 0.6
"""Share of the memory that a network with gradient checkpointing fills: what it still keeps, and what one segment
computes again."""
PATIENT = 1800.0
"""Seconds of training from which a CPU gets the wide network. In minutes its fewer steps cost more than its width
brings (hippocampus, validation Dice after 330 s: .8892 with 16, .8815 with 24)."""


class Geometry(NamedTuple):
    """What the network will see of an image."""

    spacing: tuple[float, ...] | None
    shape: tuple[float, ...]


def default_model(fingerprint: Fingerprint, machine: Machine) -> str:
    """Name of the network that trial 0 trains.

    A ResNet-18 that keeps every pixel of a thumbnail does 0.5 GFLOP for each: on a CPU, a network for small images sees
    them six times as often in the same time, and learns more.
    """
    if fingerprint.columns:
        return "mlp"
    if find_task(fingerprint.task).dense:
        return "unet"
    thumbnails = fingerprint.ndim == 2 and max(fingerprint.shape_median) <= SMALL_IMAGE
    return "small_cnn" if thumbnails and machine.device == "cpu" else "resnet18"


def plan(
    fingerprint: Fingerprint,
    machine: Machine,
    *,
    model: str | None = None,
    budget: float | None = None,
    horizon: float | None = None,
) -> Tree:
    """The strong default for a data set, as a sparse tree of Experiment fields.

    Args:
        fingerprint: what was measured on the training data.
        machine: where it will train.
        model: a network of the catalogue; the fields that depend on it follow. None: :func:`default_model`.
        budget: seconds of training; None keeps ``train.epochs``.
        horizon: seconds for which the network will have trained in the end, where ``budget`` is of a trial on the way
            there; None: ``budget``, or as long as it takes.

    Raises:
        ModelError: the catalogue has no such network.
    """
    spec = lookup(model or default_model(fingerprint, machine))
    geometry = target_geometry(fingerprint)
    tree: Tree = {"task": {"kind": fingerprint.task}, "preprocess": normalisation(fingerprint)}
    if find_task(fingerprint.task).dense:
        tree["preprocess"]["spacing"] = geometry.spacing
        merge(tree, _segmentation(fingerprint, geometry, machine, spec, horizon or budget or PATIENT))
    else:
        merge(tree, _classification(fingerprint, machine, spec))
    if fingerprint.columns:
        # A row costs next to nothing: whole sets in a few steps, in full precision, for hundreds of passes.
        merge(tree, {"train": {"precision": "fp32", "ema": 0.0, "epochs": 200, "checkpointing": "off"}})
        merge(tree, {"optim": {"lr": 5e-3}, "loss": {"label_smoothing": 0.0, "class_weights": None}})
    tree["augment"] = augmentation(fingerprint)
    if budget is not None:
        tree["train"]["budget"] = budget
    return tree


def merge(base: Tree, extra: Tree) -> None:
    """Lay ``extra`` over ``base``, in place, section by section."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def target_geometry(fingerprint: Fingerprint) -> Geometry:
    """Spacing to resample to (None: keep) and the median shape afterwards.

    The median spacing of the training cases; of a coarse axis (over 3 times the finest) the smallest, so that thin
    slices are not lost. Data that agree within 1 % are left as they are.
    """
    shape = tuple(float(n) for n in fingerprint.shape_median)
    low, middle, high = fingerprint.spacing_min, fingerprint.spacing_median, fingerprint.spacing_max
    if low is None or middle is None or high is None:
        return Geometry(None, shape)
    if all(b - a <= 0.01 * m for a, m, b in zip(low, middle, high, strict=True)):
        return Geometry(None, shape)
    finest = min(middle)
    target = tuple(a if m > 3 * finest else m for a, m in zip(low, middle, strict=True))
    return Geometry(
        tuple(round(t, 4) for t in target), tuple(n * m / t for n, m, t in zip(shape, middle, target, strict=True))
    )


def normalisation(fingerprint: Fingerprint) -> Tree:
    """CT has physical units, so one scale for all; images else are scaled one by one.

    A table's numbers are standardised column by column, its kinds and gaps stay 0 and 1.
    """
    if fingerprint.columns:
        plain = [part for text in fingerprint.columns for part in _is_number(text)]
        stats = list(zip(plain, fingerprint.intensity, strict=True))
        return {
            "normalize": "columns",
            "columns": list(fingerprint.columns),
            "mean": [round(c.mean, 6) if number else 0.0 for number, c in stats],
            "std": [round(max(c.std, 1e-3), 6) if number else 1.0 for number, c in stats],
        }
    if fingerprint.modality != "CT":
        return {"normalize": "zscore"}
    channels = fingerprint.intensity
    return {
        "normalize": "ct",
        "clip": [[round(c.p005, 3), round(c.p995, 3)] for c in channels],
        "mean": [round(c.mean, 4) for c in channels],
        "std": [round(max(c.std, 1e-3), 4) for c in channels],
    }


def _is_number(text: str) -> list[bool]:
    """Of each channel of a column, as it is written, whether it holds the number itself."""
    kinds = text.partition("=")[2]
    return [False] * len(kinds.split("|")) if kinds else [True, False] if text.endswith("?") else [True]


def augmentation(fingerprint: Fingerprint) -> Tree:
    """Which random changes are plausible for the modality. Mirroring is off: left and right differ in a body."""
    tree: Tree = {"strength": 1.0}
    if fingerprint.columns:
        return {"strength": 0.0} | {name: 0.0 for name in AugmentConfig.model_fields if name.startswith("p_")}
    if fingerprint.modality in ("fundus", "dermoscopy", "microscopy"):
        tree |= {"flip_axes": list(range(fingerprint.ndim)), "rotate_deg": 180.0 if fingerprint.ndim == 2 else 15.0}
    if fingerprint.modality == "US":
        tree |= {"flip_axes": [1]}
    if fingerprint.modality == "MR":
        tree |= {"p_bias_field": 0.1}
    return tree


def _segmentation(
    fingerprint: Fingerprint, geometry: Geometry, machine: Machine, spec: ModelSpec, horizon: float
) -> Tree:
    ndim, gpu = fingerprint.ndim, machine.device == "cuda"
    width = WIDTH if gpu or horizon >= PATIENT else NARROW
    budgeted = (VOXELS_3D if ndim == 3 else PIXELS_2D)[machine.device]
    wanted = _shrink([float(n) for n in geometry.shape], budgeted)
    model: Tree = {"name": spec.name}
    own = spec.family == OWN_FAMILY
    if own:
        model["feature_size"] = width
    if "depth" in spec.options:
        model["depth"] = spec.fitting_depth(tuple(math.ceil(n) for n in wanted))
    if "deep_supervision" in spec.options:
        model["deep_supervision"] = True
    config = ModelConfig.model_validate(model)
    multiple, smallest = spec.divisor(config, ndim), spec.smallest(config, ndim)
    patch_size = [max(smallest, math.ceil(n / multiple) * multiple) for n in wanted]
    batch, checkpointing = _segmentation_batch(patch_size, width, machine, fingerprint, horizon)
    foreground = 1.0 - fingerprint.class_fraction.get(fingerprint.classes[0], 0.0)
    covers = all(p >= n for p, n in zip(patch_size, geometry.shape, strict=True))
    patches = math.prod(geometry.shape) / math.prod(patch_size)
    return {
        "model": model,
        "loss": {"name": "dice_ce", "batch_dice": True},
        "optim": {"name": "adamw", "lr": 2e-3 if own else 5e-4, "weight_decay": 1e-2},
        "schedule": {"name": "cosine"},
        "train": {
            "patch_size": patch_size,
            "batch_size": batch,
            "checkpointing": checkpointing,
            "samples_per_case": 1 if covers else min(16, max(2, round(patches))),
            "foreground": 0.0 if covers else (0.5 if foreground < 0.02 else 0.33),
            "ema": 0.99,
            "epochs": 1000,
        },
        "inference": {"overlap": 0.5 if gpu or ndim == 2 else 0.25},
    }


def _shrink(shape: list[float], voxels: int) -> list[float]:
    """Cut the longest axis, again and again, until the patch has at most ``voxels``."""
    shape = list(shape)
    while math.prod(shape) > voxels:
        longest = max(range(len(shape)), key=lambda axis: shape[axis])
        others = math.prod(n for axis, n in enumerate(shape) if axis != longest)
        second = max((n for axis, n in enumerate(shape) if axis != longest), default=1.0)
        wanted = max(second * 0.9, voxels / others)
        shape[longest] = min(shape[longest] * 0.95, max(wanted, 8.0))
    return shape


def _segmentation_batch(
    patch: list[int], width: int, machine: Machine, fingerprint: Fingerprint, horizon: float
) -> tuple[int, str]:
    # A CPU takes some hundred steps in minutes, and twice as many of half the size learn more (DRIVE's training cases,
    # 400 s a side on one thread: Dice .702 against .669 on the validation cases).
    short = horizon < PATIENT
    # A U-Net keeps about 40 maps of its first width for backward, all levels counted, at 4 bytes.
    per_sample = math.prod(patch) * width * 40 * 4
    planar = fingerprint.ndim == 2
    if machine.device == "cpu":
        sensible = (4 if short else 8) if planar else 2
    else:
        sensible = 32 if planar else 8
    return _fitting(min(sensible, max(1, fingerprint.cases)), per_sample, machine)


def _fitting(batch: int, per_sample: int, machine: Machine) -> tuple[int, str]:
    """As much of a batch as memory holds, and ``train.checkpointing``: it costs time, so only where it lets in more."""
    if batch * per_sample <= machine.training_memory:
        return batch, "off"
    return max(1, min(batch, int(machine.training_memory // (per_sample * CHECKPOINTED)))), "auto"


def _classification(fingerprint: Fingerprint, machine: Machine, spec: ModelSpec) -> Tree:
    gpu = machine.device == "cuda"
    config = ModelConfig(name=spec.name)
    multiple, smallest = spec.divisor(config, fingerprint.ndim), spec.smallest(config, fingerprint.ndim)
    size = [max(smallest, math.ceil(n / multiple) * multiple) for n in _classification_size(fingerprint, gpu)]
    pixels = math.prod(size)
    share = [n for n in fingerprint.class_cases.values() if n > 0] or [1]
    imbalance = max(share) / min(share)
    task = find_task(fingerprint.task)
    sensible = max(4, min(128, (2**21 if gpu else 2**17) // pixels))
    wanted = min(sensible, max(2, fingerprint.cases // 8))
    batch, checkpointing = _fitting(wanted, pixels * 64 * 4 * 16, machine)
    weights = None
    if imbalance > 1.5 and task.rare_weigh_more:
        # Square-root weights: half way between the data's frequencies and equal classes.
        inverse = [1.0 / math.sqrt(max(fingerprint.class_cases.get(c, 0), 1)) for c in fingerprint.classes]
        weights = [round(w * len(inverse) / sum(inverse), 4) for w in inverse]
    return {
        "preprocess": {"size": size},
        "model": {"name": spec.name} | ({"dropout": 0.2} if "dropout" in spec.options else {}),
        "loss": {"name": next(iter(task.losses)), "label_smoothing": 0.05, "class_weights": weights},
        "optim": {"name": "adamw", "lr": 1e-3 if max(size) <= SMALL_IMAGE else 3e-4, "weight_decay": 5e-2},
        "schedule": {"name": "cosine", "warmup": 0.05},
        "train": {
            "batch_size": max(2, batch),
            "checkpointing": checkpointing,
            "patch_size": None,
            "ema": 0.99,
            "foreground": 0.0,
            "epochs": 60,
        },
        "inference": {"overlap": 0.0},
    }


def _classification_size(fingerprint: Fingerprint, gpu: bool) -> list[int]:
    """Small images keep their size; larger ones come to a common one that the machine can train in the time."""
    shape = fingerprint.shape_median
    if max(shape) <= SMALL_IMAGE and fingerprint.shape_min == fingerprint.shape_max:
        return [int(n) for n in shape]
    if fingerprint.ndim == 2:
        largest = 224 if gpu else 128
        side = min(largest, max(32, math.ceil(max(shape) / 32) * 32))
        return [side, side]
    scale = min(1.0, ((96**3 if gpu else 48**3) / math.prod(shape)) ** (1 / 3))
    return [max(16, round(n * scale / 8) * 8) for n in shape]
