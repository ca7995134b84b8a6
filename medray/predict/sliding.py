"""From whole images to probabilities: sliding windows, padding, mirror averaging.

Shape legend: C channels, K classes, N images, *s spatial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medray.data.preprocess import OUTSIDE
from medray.errors import ModelError
from medray.learn.activations import softmax
from medray.predict.predictor import Callback, Floats


def segment(
    predictor: Callback,
    array: Floats,
    *,
    patch_size: Sequence[int] | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
    flip_axes: Sequence[int] = (),
    divisor: int | Sequence[int] = 1,
) -> Floats:
    """Class probabilities of one prepared image.

    Windows are blended with Gaussian weights, in float32 on the CPU (nnU-Net: Isensee et al., Nature Methods 2021).

    Args:
        predictor: (B, C, *s) to logits (B, K, *s).
        array: (C, *s) float32.
        patch_size: of the windows; None for the image as a whole. An image smaller than a window is padded.
        overlap: of two neighbouring windows, 0 <= overlap < 1.
        batch_size: windows at once.
        flip_axes: spatial axes for mirror averaging (test-time augmentation): all 2^n combinations are averaged.
        divisor: each axis is padded to a multiple of it where the image is taken as a whole.

    Returns:
        (K, *s) float32, summing to 1 over K.

    Raises:
        ModelError: patch, overlap or axes do not fit the image, or the logits are not of the image's shape.
    """
    spatial = array.shape[1:]
    _check(array, patch_size, overlap, flip_axes)

    def mean_over_flips(batch: Floats) -> Floats:
        total: Floats | None = None
        subsets = _subsets(flip_axes)
        for axes in subsets:
            flipped = tuple(axis + 2 for axis in axes)
            logits = predictor(np.ascontiguousarray(np.flip(batch, flipped)) if flipped else batch)
            if logits.ndim != batch.ndim or logits.shape[2:] != batch.shape[2:]:
                raise ModelError(
                    f"logits of shape {logits.shape} for a batch of {batch.shape}: a segmentation model gives "
                    "(B, K, *spatial)"
                )
            probability = softmax(logits)
            probability = np.flip(probability, flipped) if flipped else probability
            total = probability if total is None else total + probability
        assert total is not None
        return np.ascontiguousarray(total / len(subsets)) if len(subsets) > 1 else total

    if patch_size is None:
        divisors = (divisor,) * len(spatial) if isinstance(divisor, int) else tuple(divisor)
        padded, inner = _pad(array, [-(-n // d) * d for n, d in zip(spatial, divisors, strict=True)])
        return np.ascontiguousarray(mean_over_flips(padded[None])[0][inner])

    from monai.inferers.utils import sliding_window_inference

    window = tuple(int(n) for n in patch_size)
    padded, inner = _pad(array, [max(n, p) for n, p in zip(spatial, window, strict=True)])
    blended: Any = sliding_window_inference(
        torch.from_numpy(padded)[None],
        roi_size=window,
        sw_batch_size=batch_size,
        predictor=lambda x: torch.from_numpy(mean_over_flips(x.numpy())),
        overlap=overlap,
        mode="gaussian",
        device=torch.device("cpu"),
    )
    return np.ascontiguousarray(blended[0].numpy()[inner])


def window_count(
    shape: Sequence[int], *, patch_size: Sequence[int] | None, overlap: float, flip_axes: Sequence[int] = ()
) -> int:
    """How many windows :func:`segment` gives the network for a prepared image (*s), mirrored ones counted."""
    views = 2 ** len(flip_axes)
    if patch_size is None:
        return views
    for size, patch in zip(shape, patch_size, strict=True):
        views *= -(-max(0, size - patch) // _step(patch, overlap)) + 1
    return views


def load_libraries() -> None:
    """Import what the first window would: a caller that times windows calls this before."""
    import monai.inferers.utils  # noqa: F401


def segment_labels(
    predictor: Callback,
    array: Floats,
    *,
    patch_size: Sequence[int],
    num_classes: int,
    overlap: float = 0.5,
    batch_size: int = 1,
    flip_axes: Sequence[int] = (),
    limit_bytes: int = 1 << 30,
) -> npt.NDArray[np.uint8]:
    """Labels (*s) of an image whose K float32 probabilities would not fit into ``limit_bytes``.

    The first axis is cut into slabs, each of which holds all windows that touch its inner part: the labels are those of
    :func:`segment` and an argmax, at the price of computing the windows at the seams twice.

    Args:
        predictor: as for :func:`segment`, and so all others.
        array: (C, *s) float32; may be a memory map.
        patch_size: of the windows.
        num_classes: K, at most 256.
        overlap: of two neighbouring windows.
        batch_size: windows at once.
        flip_axes: mirrored axes.
        limit_bytes: of the probabilities held at once.
    """
    if num_classes > 256:
        raise ModelError(f"{num_classes} classes do not fit a uint8 label map; medray segments at most 256")
    labels = np.zeros(array.shape[1:], dtype=np.uint8)
    plane = num_classes * 4 * int(np.prod(array.shape[2:]))
    for slab, inner, core in _slabs(array.shape[1], int(patch_size[0]), overlap, max(1, limit_bytes // plane)):
        part = segment(
            predictor,
            array[:, slab],
            patch_size=patch_size,
            overlap=overlap,
            batch_size=batch_size,
            flip_axes=flip_axes,
        )
        labels[core] = part[:, inner].argmax(axis=0)
    return labels


def classify(predictor: Callback, arrays: Floats, *, flip_axes: Sequence[int] = (), batch_size: int = 64) -> Floats:
    """Logits (N, O) of prepared images (N, C, *s), ``batch_size`` at once, averaged over mirror images."""
    if not len(arrays):
        raise ModelError("classify got no image; give at least one")
    _check(arrays[0], None, 0.0, flip_axes)
    subsets = _subsets(flip_axes)
    rows = []
    for start in range(0, len(arrays), batch_size):
        batch = np.asarray(arrays[start : start + batch_size], dtype=np.float32)
        views = [predictor(np.ascontiguousarray(np.flip(batch, tuple(a + 2 for a in axes)))) for axes in subsets]
        rows.append(np.mean(views, axis=0, dtype=np.float32) if len(views) > 1 else views[0])
    return np.concatenate(rows)


def _subsets(axes: Sequence[int]) -> list[tuple[int, ...]]:
    return [subset for size in range(len(axes) + 1) for subset in combinations(axes, size)]


def _check(array: Floats, patch_size: Sequence[int] | None, overlap: float, flip_axes: Sequence[int]) -> None:
    ndim = array.ndim - 1
    if patch_size is not None and (len(patch_size) != ndim or min(patch_size) < 1):
        raise ModelError(
            f"patch size {tuple(patch_size)} for an image with {ndim} spatial axes: give {ndim} positive numbers"
        )
    if not 0.0 <= overlap < 1.0:
        raise ModelError(f"overlap {overlap} must be at least 0 and below 1")
    if any(not 0 <= axis < ndim for axis in flip_axes) or len(set(flip_axes)) != len(flip_axes):
        raise ModelError(f"mirror axes {tuple(flip_axes)} must be different numbers from 0 to {ndim - 1}")


def _pad(array: Floats, size: Sequence[int]) -> tuple[Floats, tuple[slice, ...]]:
    """Pad (C, *s) at both ends alike to ``size`` with what training patches have outside; the slices undo it.

    The result is the caller's own, writable array.
    """
    widths, inner = [(0, 0)], [slice(None)]
    for have, want in zip(array.shape[1:], size, strict=True):
        before = (want - have) // 2
        widths.append((before, want - have - before))
        inner.append(slice(before, before + have))
    return np.pad(np.asarray(array, dtype=np.float32), widths, constant_values=OUTSIDE), tuple(inner)


def _step(patch: int, overlap: float) -> int:
    return max(1, int(patch * (1 - overlap)))  # MONAI's own rule, so that the grids agree


def _slabs(size: int, patch: int, overlap: float, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Cut an axis into slabs whose windows are windows of the whole axis.

    Yields:
        (slab of the axis, inner part within the slab, the same part within the axis); the inner parts tile the axis.
    """
    step = _step(patch, overlap)
    if size <= max(patch, most):
        yield slice(0, size), slice(0, size), slice(0, size)
        return
    last = -(-(size - patch) // step)  # index of the last window, which is moved back to end with the axis
    more = max(0, (most - patch) // step)  # windows of a slab beyond its first

    def start_of(window: int) -> int:
        return min(window * step, size - patch)

    done = 0
    while done < size:
        first = max(0, (done - patch) // step + 1)  # the first window that reaches beyond what is done
        end = min(first + more, last)
        while end < last and start_of(end + 1) <= done:  # at least one row of progress
            end += 1
        until = size if end == last else start_of(end + 1)
        start, stop = start_of(first), start_of(end) + patch
        yield slice(start, stop), slice(done - start, until - start), slice(done, until)
        done = until
