"""From an image as read to the array that the network sees, and back.

Order: crop to the non-zero box, normalise, resample (to a spacing or to a shape), pad. All resampling is separable,
linear, with pixel centres at half-integers (``align_corners=False``): the field of view stays, and going there and back
moves nothing. Where an axis shrinks, the kernel widens (anti-aliasing).

Shape legend: C channels, K classes; ``*s`` is the prepared spatial shape, ``*o`` the image's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from medray.config.schema import PreprocessConfig
from medray.data.image import Image, Mask
from medray.data.manifest import IGNORE
from medray.errors import ConfigError, DataError

__all__ = ["Geometry", "Preprocessor", "resize_linear", "resize_nearest"]

Float = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

_BACKGROUND_SHARE = 0.1  # a minimum that fills this share of a channel is background, not tissue
_MAX_VOXELS = 2**31  # of one prepared channel (8 GB): beyond it, a spacing is a mistake


OUTSIDE = 0.0
"""What a network sees beyond the image, in training and in use alike: the mean of a normalised one. A network that was
trained on one padding and is run on another segments too much (seen: Dice .71 for .87)."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a prepared array lies in the image that it came from.

    Attributes:
        shape: *o, of the image as read (RAS).
        crop: (start, stop) per axis of the box that was kept.
        resized: spatial shape that the box was resampled to.
        pad: (before, after) per axis that was added after that.
        spacing: mm per axis of the prepared array; None where the image has none.
    """

    shape: tuple[int, ...]
    crop: tuple[tuple[int, int], ...]
    resized: tuple[int, ...]
    pad: tuple[tuple[int, int], ...]
    spacing: tuple[float, ...] | None

    @property
    def prepared(self) -> tuple[int, ...]:
        """*s, the spatial shape of the prepared array."""
        return tuple(n + before + after for n, (before, after) in zip(self.resized, self.pad, strict=True))

    @property
    def box(self) -> tuple[slice, ...]:
        """The crop as slices."""
        return tuple(slice(start, stop) for start, stop in self.crop)

    @property
    def inner(self) -> tuple[slice, ...]:
        """The prepared array without its padding, as slices."""
        return tuple(slice(before, before + n) for n, (before, _) in zip(self.resized, self.pad, strict=True))


class Preprocessor:
    """Prepares images and masks, and restores what a network says about them.

    Args:
        config: what to do.
        ndim: spatial axes, 2 or 3.
        channels: of every image.

    Raises:
        ConfigError: the configuration does not fit ``ndim`` or ``channels``, or contradicts itself.
    """

    def __init__(self, config: PreprocessConfig, *, ndim: int, channels: int) -> None:
        self.config, self.ndim, self.channels = config, ndim, channels
        for name, value in (("spacing", config.spacing), ("size", config.size)):
            if value is not None and len(value) != ndim:
                raise ConfigError(
                    f"preprocess.{name}={list(value)} has {len(value)} values, the images have {ndim} axes"
                )
        if config.size is not None and min(config.size) < 1:
            raise ConfigError(f"preprocess.size={list(config.size)} must be at least 1 along each axis")
        if config.spacing is not None and config.size is not None:
            raise ConfigError("preprocess.spacing and preprocess.size exclude each other: set one of them to null")
        self._clip = self._per_channel("clip", config.clip, needed=config.normalize in ("ct", "range"))
        self._mean = self._per_channel("mean", config.mean, needed=config.normalize in ("ct", "columns"))
        self._std = self._per_channel("std", config.std, needed=config.normalize in ("ct", "columns"))
        for low, high in self._clip or ():
            if not low < high:
                raise ConfigError(f"preprocess.clip: {low} must be below {high}")

    def _per_channel(self, name: str, value: Sequence[Any] | None, *, needed: bool) -> tuple[Any, ...] | None:
        if value is None:
            if needed:
                raise ConfigError(
                    f"preprocess.normalize={self.config.normalize} needs preprocess.{name}, one value per channel "
                    f"({self.channels}); medray plan measures it"
                )
            return None
        if len(value) not in (1, self.channels):
            raise ConfigError(f"preprocess.{name} has {len(value)} values, the images have {self.channels} channel(s)")
        return tuple(value) * (self.channels if len(value) == 1 else 1)

    def prepare(self, image: Image) -> tuple[Float, Geometry]:
        """Prepare one image.

        Returns:
            array (C, *s) float32, contiguous and the caller's own, and how it lies in the image.

        Raises:
            DataError: the image has other axes or channels, or no spacing where one is asked for.
        """
        if image.ndim != self.ndim or image.array.shape[0] != self.channels:
            raise DataError(
                f"{image.source or 'image'}: {image.array.shape[0]} channel(s) and {image.ndim} spatial axes, expected "
                f"{self.channels} and {self.ndim}. Remove the case, or give it the data set's own form"
            )
        geometry = self.geometry(image)
        array = np.array(image.array[(slice(None), *geometry.box)], dtype=np.float32, order="C")
        for channel, pixels in enumerate(array):
            self._normalize(pixels, channel)
        array = resize_linear(array, geometry.resized)
        if any(after for _, after in geometry.pad):
            array = np.pad(array, ((0, 0), *geometry.pad))  # zeros: the mean of a normalised image
        return np.ascontiguousarray(array), geometry

    def geometry(self, image: Image) -> Geometry:
        """Where the image would be cropped, and what shapes it would take; no pixel is changed."""
        config, shape = self.config, image.shape
        crop = _nonzero_box(image.array) if config.crop_foreground else tuple((0, n) for n in shape)
        kept = tuple(stop - start for start, stop in crop)
        resized = kept
        if config.size is not None:
            resized = config.size
        elif config.spacing is not None:
            if image.spacing is None:
                raise DataError(
                    f"{image.source or 'image'}: states no pixel spacing, so that it can't be resampled to "
                    f"{list(config.spacing)} mm. Set preprocess.spacing=null"
                )
            resized = tuple(
                max(1, round(n * own / asked))
                for n, own, asked in zip(kept, image.spacing, config.spacing, strict=True)
            )
        if math.prod(resized) > _MAX_VOXELS:
            raise DataError(
                f"{image.source or 'image'}: {list(kept)} voxels would become {list(resized)}, over the limit of "
                f"{_MAX_VOXELS}. Set a coarser preprocess.spacing or size"
            )
        spacing = None
        if image.spacing is not None:
            spacing = tuple(float(own) * n / m for own, n, m in zip(image.spacing, kept, resized, strict=True))
        extra = [-n % config.pad_multiple for n in resized]
        return Geometry(
            shape=shape,
            crop=crop,
            resized=resized,
            pad=tuple((n // 2, n - n // 2) for n in extra),
            spacing=spacing,
        )

    def prepare_mask(self, mask: Mask, geometry: Geometry, valid: Mask | None = None) -> Labels:
        """Prepare a mask as its image was.

        Labels are resampled one at a time, linearly, and the largest share wins, as in nnU-Net: smoother than nearest
        neighbours, with three volumes in memory whatever the number of classes.

        Returns:
            labels (*s) uint8; IGNORE in the padding, where ``valid`` is 0 and where the mask says IGNORE itself.

        Raises:
            DataError: the mask has another shape than the image, or labels outside 0..255.
        """
        out = np.full(geometry.prepared, IGNORE, dtype=np.uint8)
        labels = self._cropped(mask, geometry)
        present = np.unique(labels)
        if present[0] < 0 or present[-1] > IGNORE:
            raise DataError(
                f"{mask.source or 'mask'}: labels {present[0]}..{present[-1]}, expected 0..{IGNORE - 1} (and {IGNORE} "
                "for pixels to ignore). Is it a map of instances or of intensities?"
            )
        if labels.shape == geometry.resized:
            inner = labels.astype(np.uint8)
        elif len(present) == 1:
            inner = np.full(geometry.resized, present[0], dtype=np.uint8)
        else:
            shares = (resize_linear((labels == k).astype(np.float32)[None], geometry.resized)[0] for k in present)
            inner = present.astype(np.uint8)[_running_argmax(shares)]
        if valid is not None:
            inside = resize_nearest((self._cropped(valid, geometry) != 0).astype(np.uint8), geometry.resized)
            inner[inside == 0] = IGNORE
        out[geometry.inner] = inner
        return out

    def restore(self, array: Float, geometry: Geometry, *, outside: float = 0.0) -> Float:
        """Bring (K, *s) back to the image's own grid, linearly: (K, *o) float32.

        ``outside`` fills what had been cropped away. For the labels alone :meth:`restore_argmax` needs less memory.
        """
        out = np.full((array.shape[0], *geometry.shape), outside, dtype=np.float32)
        size = tuple(stop - start for start, stop in geometry.crop)
        for plane, target in zip(array, out, strict=True):
            target[geometry.box] = resize_linear(plane[geometry.inner][None], size)[0]
        return out

    def restore_argmax(self, array: Float, geometry: Geometry) -> Labels:
        """Labels (*o) uint8 of the largest of K scores (K, *s), compared on the image's own grid; background outside.

        The scores are resampled one at a time: three volumes of the image's size in memory, whatever K is.
        """
        out = np.zeros(geometry.shape, dtype=np.uint8)
        size = tuple(stop - start for start, stop in geometry.crop)
        planes = (resize_linear(plane[geometry.inner][None], size)[0] for plane in array)
        out[geometry.box] = _running_argmax(planes)
        return out

    def restore_labels(self, labels: npt.NDArray[np.integer[Any]], geometry: Geometry) -> npt.NDArray[np.integer[Any]]:
        """Bring labels (*s) back to the image's own grid by nearest neighbours: (*o), background outside the crop."""
        out = np.zeros(geometry.shape, dtype=labels.dtype)
        size = tuple(stop - start for start, stop in geometry.crop)
        out[geometry.box] = resize_nearest(labels[geometry.inner], size)
        return out

    def _cropped(self, mask: Mask, geometry: Geometry) -> npt.NDArray[np.integer[Any]]:
        if mask.array.shape != geometry.shape:
            raise DataError(
                f"{mask.source or 'mask'}: shape {list(mask.array.shape)}, its image has {list(geometry.shape)}. They "
                "must lie on the same grid"
            )
        return mask.array[geometry.box]

    def _normalize(self, pixels: Float, channel: int) -> None:
        """Normalise one channel (*s) in place."""
        if self.config.normalize == "columns":
            assert self._mean is not None
            pixels[~np.isfinite(pixels)] = np.float32(self._mean[channel])
        elif not np.isfinite(pixels.sum(dtype=np.float64)):
            finite = np.isfinite(pixels)
            pixels[~finite] = pixels[finite].min() if finite.any() else 0.0
        if self._clip is not None:
            np.clip(pixels, *self._clip[channel], out=pixels)
        match self.config.normalize:
            case "none":
                return
            case "range":
                assert self._clip is not None
                low, high = self._clip[channel]
                shift, scale = (low + high) / 2, (high - low) / 2
            case "ct" | "columns":
                assert self._mean is not None and self._std is not None
                shift, scale = self._mean[channel], self._std[channel]
            case "zscore":
                shift, scale = _tissue_statistics(pixels)
        pixels -= np.float32(shift)
        pixels /= np.float32(scale)


def _tissue_statistics(pixels: Float) -> tuple[float, float]:
    """Mean and standard deviation without a constant background; deviation 1 where all pixels are alike."""
    lowest = pixels.min()
    background = np.count_nonzero(pixels == lowest) / pixels.size
    tissue = pixels[pixels > lowest] if _BACKGROUND_SHARE <= background < 1 else pixels
    mean, std = float(tissue.mean(dtype=np.float64)), float(tissue.std(dtype=np.float64))
    return mean, std if std > 1e-8 * max(1.0, abs(mean)) else 1.0


def _nonzero_box(array: Float) -> tuple[tuple[int, int], ...]:
    """(start, stop) per axis of the box around all pixels that are non-zero in any channel; all, if there is none."""
    inside = (array != 0).any(axis=0)
    box = []
    for axis, n in enumerate(inside.shape):
        where = np.flatnonzero(inside.any(axis=tuple(a for a in range(inside.ndim) if a != axis)))
        box.append((int(where[0]), int(where[-1]) + 1) if where.size else (0, n))
    return tuple(box)


def _running_argmax(planes: Iterable[Float]) -> Labels:
    """Index of the largest of several (*s) planes, which are looked at one at a time; the first wins a tie."""
    best: Float | None = None
    winner: Labels | None = None
    for k, plane in enumerate(planes):
        if best is None or winner is None:
            best, winner = plane.copy(), np.zeros(plane.shape, dtype=np.uint8)
            continue
        larger = plane > best
        winner[larger] = k
        np.maximum(best, plane, out=best)
    assert winner is not None
    return winner


def resize_linear(array: Float, size: Sequence[int]) -> Float:
    """Resize (C, *s) to (C, *size), linearly and with anti-aliasing, one axis after the other."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    # the axes that shrink most come first: what is in memory between is as small as can be
    for axis in sorted(range(1, tensor.ndim), key=lambda a: size[a - 1] / tensor.shape[a]):
        n, m = tensor.shape[axis], int(size[axis - 1])
        if n == m:
            continue
        before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
        lines, width = math.prod(before), math.prod(after)
        # torch 2.14 gives nonsense when it anti-aliases the height of an image of width 1: such an axis lies down
        flat = tensor.reshape(1, lines, n, width) if width > 1 else tensor.reshape(1, lines, 1, n)
        to = (m, width) if width > 1 else (1, m)
        flat = F.interpolate(flat, size=to, mode="bilinear", align_corners=False, antialias=m < n)
        tensor = flat.reshape(*before, m, *after)
    return tensor.numpy()


def resize_nearest(labels: npt.NDArray[Any], size: Sequence[int]) -> npt.NDArray[Any]:
    """Resize (*s) to (*size) by nearest neighbours, pixel centres at half-integers."""
    if labels.shape == tuple(size):
        return labels.copy()
    rows = [
        np.minimum(((np.arange(m) + 0.5) * n / m).astype(np.intp), n - 1)
        for n, m in zip(labels.shape, size, strict=True)
    ]
    return labels[np.ix_(*rows)]
