"""The gate behind each step of a compression: what it lost on validation cases, what it gained where it will serve."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medray.bundle.engines import ONNX_NAME
from medray.bundle.files import locate
from medray.bundle.read import Bundle
from medray.data.cache import PreparedStore
from medray.data.manifest import IGNORE
from medray.data.preprocess import OUTSIDE
from medray.data.readers import read_case
from medray.errors import CompressionError
from medray.learn.intervals import Interval
from medray.learn.metrics import dice_per_class
from medray.predict.predictor import Floats, Predictor
from medray.predict.sliding import classify
from medray.workflows.champion import Scores, difference
from medray.workflows.judging import spread
from medray.workflows.recipe import Recipe

Aim = Literal["speed", "size"]
"""What a step is for."""
NOISE = 0.05
"""Share by which the clock, or a packer, may differ by chance; a gain in size or speed beside it is none."""
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Before and after one step.

    Attributes:
        metrics: (before, after), on validation cases.
        drops: before minus after, with the 95 % interval of the paired bootstrap over patients.
        engines: what answered before and after.
        latency_ms: of one network input by these engines, medians of turns.
        onnx_mb: of the file that is served; ``packed_mb``: of the same, deflated, as it travels; ``bundle_mb``: of all
            files.
    """

    metrics: dict[str, tuple[float, float]]
    drops: dict[str, Interval]
    engines: tuple[str, str]
    latency_ms: tuple[float, float]
    onnx_mb: tuple[float, float]
    packed_mb: tuple[float, float]
    bundle_mb: tuple[float, float]

    @property
    def speedup(self) -> float:
        """How many times faster."""
        return self.latency_ms[0] / self.latency_ms[1]

    @property
    def shown(self) -> str:
        """One line for a person."""
        parts = [
            f"{name} {after:.4f} after {before:.4f} (drop {self.drops[name].value:+.4f}, 95 % CI "
            f"{self.drops[name].low:+.4f} to {self.drops[name].high:+.4f})"
            for name, (before, after) in self.metrics.items()
        ]
        parts.append(
            f"{self.speedup:.2f} x as fast ({self.latency_ms[0]:.3g} ms by {self.engines[0]}, "
            f"{self.latency_ms[1]:.3g} ms by {self.engines[1]})"
        )
        parts.append(
            f"{self.onnx_mb[1]:.2f} MB served after {self.onnx_mb[0]:.2f}, packed {self.packed_mb[1]:.2f} after "
            f"{self.packed_mb[0]:.2f}"
        )
        return ", ".join(parts)

    def against(self, max_drop: float, aim: Aim = "speed") -> str:
        """Why the step may not be kept; empty where it may."""
        reasons = [
            f"{name} drops by {drop.value:.4f}, more than the {max_drop:g} allowed"
            for name, drop in self.drops.items()
            if not drop.value <= max_drop  # a NaN is no proof
        ]
        least = 1.0 if aim == "speed" else 1.0 - NOISE
        if not self.speedup > least:
            reasons.append(f"it is slower: {self.latency_ms[1]:.3g} ms after {self.latency_ms[0]:.3g}")
        elif aim == "size" and not (self.packed_mb[1] < self.packed_mb[0] * (1 - NOISE) or self.speedup > 1.0 + NOISE):
            reasons.append(
                f"neither latency nor size shrank: {self.latency_ms[1]:.3g} ms after {self.latency_ms[0]:.3g}, packed "
                f"{self.packed_mb[1]:.2f} MB after {self.packed_mb[0]:.2f}"
            )
        return "; ".join(reasons)


Side = tuple[Bundle, Predictor, Scores, float]
"""A bundle, what answers for it, its scores, and the seconds of one input."""


def judge(before: Side, after: Side) -> Verdict:
    """Put two bundles side by side; both were scored on the same cases."""
    old, new = before[2], after[2]
    names = old.task.guarded
    pairs = {name: (replace(old, metric=name), replace(new, metric=name)) for name in names}
    sizes = [sum(entry.bytes for entry in side[0].spec.files.values()) / 1e6 for side in (before, after)]
    onnx = [
        side[0].spec.files[ONNX_NAME].bytes / 1e6 if ONNX_NAME in side[0].spec.files else 0.0
        for side in (before, after)
    ]
    return Verdict(
        metrics={name: (one.value, other.value) for name, (one, other) in pairs.items()},
        drops={name: difference(one, other) for name, (one, other) in pairs.items()},
        engines=(f"{before[1].name} {before[1].precision}", f"{after[1].name} {after[1].precision}"),
        latency_ms=(before[3] * 1e3, after[3] * 1e3),
        onnx_mb=(onnx[0], onnx[1]),
        packed_mb=(packed(before[0]) / 1e6, packed(after[0]) / 1e6),
        bundle_mb=(sizes[0], sizes[1]),
    )


def packed(bundle: Bundle) -> int:
    """Bytes of the served file once deflated (zlib, level 6); of the weights where there is no ONNX file."""
    names = [ONNX_NAME] if ONNX_NAME in bundle.spec.files else bundle.spec.weight_files
    count = 0
    for name in names:
        packer = zlib.compressobj(6)
        with locate(bundle.directory, name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                count += len(packer.compress(chunk))
        count += len(packer.flush())
    return count


def score_bundle(bundle: Bundle, engine: Predictor, recipe: Recipe, indices: Sequence[int]) -> Scores:
    """What a bundle does on some cases of the manifest, each on its own grid, by this engine."""
    manifest, task = recipe.manifest, bundle.spec.task
    cases = [manifest.cases[index] for index in indices]
    dice, logits = [], []
    for case in cases:
        image, mask, valid = read_case(case, Path(manifest.root))
        if not task.dense:
            array, _ = bundle.prepare(image)
            logits.append(classify(engine, array[None], flip_axes=bundle.spec.inference.flip_axes)[0])
            continue
        labels = bundle.predict(image, engine).labels
        assert mask is not None and labels is not None
        truth = np.asarray(mask.array)
        if valid is not None:
            truth = np.where(np.asarray(valid.array) > 0, truth, IGNORE)
        dice.append(dice_per_class(labels, truth, len(bundle.spec.classes)))
    if not cases:
        raise CompressionError("there is no validation case, without which no step can be judged. See split.folds")
    return Scores(
        kind=task.name,
        metric=task.guarded[0],
        indices=tuple(indices),
        groups=np.asarray([case.group for case in cases]),
        dice=np.stack(dice) if dice else None,
        logits=np.stack(logits) if logits else None,
        targets=None if dice else np.asarray([case.label for case in cases], dtype=np.int64),
        temperature=bundle.spec.temperature,
    )


def calibration_batches(
    bundle: Bundle, store: PreparedStore, training: Sequence[int], count: int, seed: int
) -> Iterator[Floats]:
    """Inputs (1, C, *s) of training cases, as the network will see them: whole images, or windows around structures."""
    how = bundle.spec.inference
    rng = np.random.default_rng(seed)
    for index in spread(training, count):
        array = np.asarray(store.image(index), dtype=np.float32)
        if not bundle.spec.task.dense:
            yield array[None]
            continue
        patch = how.patch_size or tuple(-(-n // how.divisor) * how.divisor for n in array.shape[1:])
        padded = _pad(array, patch)
        centre: Any = rng.integers(0, padded.shape[1:])
        voxels = store.foreground(index)
        if len(voxels) and rng.random() < 0.7:  # the rest shows what lies between
            shift = [(n - m) // 2 for n, m in zip(padded.shape[1:], array.shape[1:], strict=True)]
            centre = voxels[rng.integers(len(voxels))] + shift
        slots = []
        for n, size, middle in zip(padded.shape[1:], patch, centre, strict=True):
            start = int(np.clip(middle - size // 2, 0, n - size))
            slots.append(slice(start, start + size))
        yield np.ascontiguousarray(padded[(slice(None), *slots)])[None]


def _pad(array: Floats, patch: Sequence[int]) -> Floats:
    widths = [(0, 0)]
    for have, want in zip(array.shape[1:], patch, strict=True):
        more = max(0, want - have)
        widths.append((more // 2, more - more // 2))
    return np.pad(array, widths, constant_values=OUTSIDE)
