"""Class-activation maps of a bundle's torch twin: where it looked, on the image's own grid.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) and Grad-CAM++ (Chattopadhay et al. 2018, arXiv:1710.11063), as
pytorch_grad_cam weighs them; in 2-D and 3-D, for classes and for segmented structures (Seg-Grad-CAM: the score is the
class's logits summed over the pixels that were given to it). Exported engines have no gradients, so the twin answers;
of an int8 bundle it has the weights before quantisation.

Shape legend: C channels, K classes, *s the prepared grid, *o the image's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medray.bundle.ensemble import EnsembleModel
from medray.bundle.read import Bundle
from medray.data.image import Image
from medray.data.preprocess import OUTSIDE
from medray.errors import MissingDependencyError, ModelError
from medray.explain.layers import Target, target_of
from medray.predict.predictor import Floats
from medray.tasks.task import Task

Method = Literal["gradcam", "gradcam++"]
METHODS: tuple[Method, ...] = get_args(Method)
_MODE = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where a network looked for one class.

    Attributes:
        heat: (*o) float32 from 0 to 1, on the image's own grid; all zero where nothing spoke for the class.
        target, target_name: the class.
        method: how it was computed.
        layer: whose maps it is made of, of the first member.
    """

    heat: Floats
    target: int
    target_name: str
    method: Method
    layer: str


def explain(
    bundle: Bundle,
    image: Image,
    *,
    method: Method = "gradcam",
    target: int | str | None = None,
    model: nn.Module | None = None,
) -> Explanation:
    """Where the bundle's network looked.

    Args:
        bundle: any, also int8 and ensembles (the members' mean, weighted as they are).
        image: as a reader gives it.
        method: gradcam or gradcam++.
        target: a class, by name or index; None for the answer itself: the likeliest class, or the largest structure.
        model: what ``bundle.model()`` gave, for callers that explain often; it is used by one thread at a time.

    Raises:
        DataError: the image isn't of the bundle's kind.
        ModelError: an unknown method or class, or a network without maps.
        MissingDependencyError: pytorch_grad_cam is not installed.
    """
    if method not in METHODS:
        raise ModelError(f"there is no method {method!r}. Choose from {', '.join(METHODS)}")
    chosen = None if target is None else _class(bundle, target)
    network = (model or bundle.model()).eval()
    members = list(network.members) if isinstance(network, EnsembleModel) else [network]
    array, geometry = bundle.prepare(image)
    windows = list(_windows(bundle, np.asarray(array, dtype=np.float32)))
    if chosen is None:
        chosen = _answer(bundle, network, windows)
    shares = network.shares if isinstance(network, EnsembleModel) else (1.0,)
    total, layer = None, ""
    for member, share in zip(members, shares, strict=True):
        heat, name = _heat(bundle, member, windows, chosen, method)
        layer = layer or name
        total = share * heat if total is None else total + share * heat
    assert total is not None
    inner = tuple(slice(0, n) for n in array.shape[1:])
    restored = bundle.restore_map(total[inner], geometry)
    return Explanation(
        heat=np.asarray(restored / max(float(restored.max()), 1e-12), dtype=np.float32),
        target=chosen,
        target_name=bundle.spec.classes[chosen],
        method=method,
        layer=layer,
    )


def _class(bundle: Bundle, target: int | str) -> int:
    names = bundle.spec.classes
    if isinstance(target, str) and target in names:
        return names.index(target)
    index = int(target) if isinstance(target, int) or target.isdigit() else -1
    if not 0 <= index < len(names):
        raise ModelError(
            f"there is no class {target!r}. Choose from {', '.join(names)}, or a number below {len(names)}"
        )
    return index


@dataclass(frozen=True)
class _Window:
    """A part of the prepared array, which is padded at its ends to what the network takes."""

    padded: Floats
    at: tuple[slice, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        return tuple(self.padded.shape[1:])

    @property
    def values(self) -> Tensor:
        """(1, C, *window), copied when asked for: all windows together hold the volume many times."""
        return torch.from_numpy(np.ascontiguousarray(self.padded[(slice(None), *self.at)]))[None]


def _windows(bundle: Bundle, array: Floats) -> Iterator[_Window]:
    """The image as a whole, or in the bundle's windows, half overlapping."""
    how = bundle.spec.inference
    size: Sequence[int] = array.shape[1:]
    if bundle.spec.task.dense:
        size = how.patch_size or [-(-n // how.divisor) * how.divisor for n in size]
    padded = np.pad(
        array,
        [(0, 0), *((0, max(0, p - n)) for n, p in zip(array.shape[1:], size, strict=True))],
        constant_values=OUTSIDE,
    )
    starts = [
        sorted({min(start, n - p) for start in range(0, n - p + max(1, p // 2), max(1, p // 2))})
        for n, p in zip(padded.shape[1:], size, strict=True)
    ]
    for corner in itertools.product(*starts):
        at = tuple(slice(start, start + p) for start, p in zip(corner, size, strict=True))
        yield _Window(padded, at)


def _answer(bundle: Bundle, network: nn.Module, windows: Sequence[_Window]) -> int:
    with torch.no_grad():
        task = bundle.spec.task
        if not task.dense:
            probable = task.probabilities(network(windows[0].values).numpy())
            (decided,) = task.decide(probable)
            return int(decided if decided.ndim == 0 else probable[0].argmax())
        counts = torch.zeros(len(bundle.spec.classes))
        for window in windows:
            labels = network(window.values)[0].argmax(0)
            counts += torch.bincount(labels.flatten(), minlength=len(counts))[: len(counts)]
    return 1 + int(counts[1:].argmax())  # background is no structure


def _heat(
    bundle: Bundle, member: nn.Module, windows: Sequence[_Window], target: int, method: Method
) -> tuple[Floats, str]:
    """(*padded) heat of one member, its largest value 1, and the layer's name."""
    chosen = target_of(member, windows[0].values)
    total = np.zeros(windows[0].whole, dtype=np.float32)
    count = np.zeros(windows[0].whole, dtype=np.float32)
    shape = tuple(part.stop - part.start for part in windows[0].at)
    weight = np.ones(shape, dtype=np.float32)
    for axis, n in enumerate(shape):  # less towards a window's ends, where it saw least: no seams
        ramp = 1.01 - np.abs(2 * (np.arange(n, dtype=np.float32) + 0.5) / n - 1)
        weight *= ramp.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    for window in windows:
        total[window.at] += weight * _window_heat(bundle, member, chosen, window.values, target, method)
        count[window.at] += weight
    heat = total / count
    return np.asarray(heat / max(float(heat.max()), 1e-12), dtype=np.float32), chosen.name


def _window_heat(
    bundle: Bundle, member: nn.Module, chosen: Target, values: Tensor, target: int, method: Method
) -> Floats:
    """(*window) positive evidence, not scaled: windows of one image stay comparable."""
    try:
        from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
    except ImportError:
        raise MissingDependencyError("pytorch_grad_cam", "an explanation", "pip install grad-cam") from None

    kind: Any = GradCAM if method == "gradcam" else GradCAMPlusPlus
    with torch.enable_grad(), kind(member, [chosen.layer], reshape_transform=chosen.reshape) as cam:
        # A leaf with a gradient of its own: maps in front of the first weights would else have none.
        values = values.clone().requires_grad_(True)
        score = _score(cam.activations_and_grads(values), target, bundle.spec.task)
        if score is None:
            return np.zeros(tuple(values.shape[2:]), dtype=np.float32)
        member.zero_grad(set_to_none=True)
        score.backward()
        store = cam.activations_and_grads
        if not store.gradients:
            raise ModelError(f"layer {chosen.name!r} has no part in the answer; it can't be explained by its maps")
        raw = cam.get_cam_image(
            values, chosen.layer, [target], store.activations[0].numpy(), store.gradients[0].numpy(), False
        )
        member.zero_grad(set_to_none=True)
    positive = torch.from_numpy(np.maximum(raw, 0)).float()[None]
    spread = F.interpolate(positive, size=tuple(values.shape[2:]), mode=_MODE[values.ndim - 2], align_corners=False)
    return spread[0, 0].numpy()


def _score(logits: Tensor, target: int, task: Task) -> Tensor | None:
    """What is derived: the evidence for a class, or its sum over the pixels given to it; None where it has none."""
    evidence = task.evidence(logits, target)[0]
    if not task.dense:
        return evidence
    mask = logits[0].detach().argmax(0) == target
    return (evidence * mask).sum() if bool(mask.any()) else None
