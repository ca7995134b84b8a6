"""Augment: random transforms of a batch of prepared samples.

Geometry is one resampling: rotation, scale, shear, translation and elastic displacement are composed into one sampling
grid for all samples drawn for any of them, so that pixels are interpolated once. Displacements are cubic B-splines on
a coarse lattice (free-form deformation, Rueckert et al., IEEE TMI 1999), kept under 0.4 lattice spacings, below which
they can't fold (Choi and Lee, 2000). Intensities change relative to each sample's own spread, so that the ranges mean
the same whatever the normalisation. What scanners do wrong comes from MONAI (bias field, truncation ringing, k-space
spikes, histogram shift); motion ghosts, which it lacks, are here.

``policy`` says how transforms are drawn: each by its own probability, or so many a sample from all that have one, as
RandAugment does (Cubuk et al., 2020; arXiv:1909.13719), or one alone, as TrivialAugment does (Müller and Hutter, 2021;
arXiv:2103.10158). How strong one is, is drawn evenly from its range in all three.

``strength`` scales every range; 0 is the identity. Shapes: images (B, C, *s) float32, masks (B, *s), any number type.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medray.config.schema import AugmentConfig
from medray.data.manifest import IGNORE
from medray.errors import ConfigError

__all__ = ["Augment"]

# ranges at strength 1; spreads are in standard deviations of the sample's channel
_BRIGHTNESS = 0.3  # added
_CONTRAST = 0.3  # factor 0.7 to 1.3 around the mean
_GAMMA = 0.4  # exponent exp(-0.4) to exp(0.4), 0.67 to 1.49
_NOISE = 0.25
_BLUR = (0.4, 1.0)  # sigma in pixels
_LOW_RESOLUTION = 1.0  # pixels up to 1 + 1.0 times as large
_BIAS = 0.3  # Legendre coefficients of the field's logarithm
_GHOST = 0.4  # of the modulated lines' signal is lost
_RINGING = (0.3, 0.7)  # MONAI's alpha: how much of k-space is cut off
_SPIKE = (0.1, 0.5)  # amplitude of the stripes
_HISTOGRAM = (0.2, 0.7)  # how far towards the random curve
_OWN_CHANNEL = 0.25  # of brightness and contrast, the share that each channel draws for itself
_LATTICE = 5  # B-spline intervals along each axis
_MARGIN = 0.125  # of a patch on each side: what a turn by 7 degrees about each axis needs


class Augment:
    """Random transforms of training batches, drawn sample by sample.

    Args:
        config: probabilities and ranges.
        ndim: spatial axes, 2 or 3.
        spacing: mm per axis, where voxels are not cubes: a rotation then stays one in millimetres.

    Attributes:
        imports: modules that its transforms take long to import.

    Raises:
        ConfigError: ``flip_axes`` names an axis that isn't there, or ``scale`` is upside down.
    """

    def __init__(self, config: AugmentConfig, *, ndim: int, spacing: Sequence[float] | None = None) -> None:
        if any(not 0 <= axis < ndim for axis in config.flip_axes):
            raise ConfigError(f"augment.flip_axes={list(config.flip_axes)}: spatial axes are 0 to {ndim - 1}")
        if config.scale[0] > config.scale[1]:
            raise ConfigError(f"augment.scale={list(config.scale)}: the first value must not be above the second")
        self.config, self.ndim = config, ndim
        self.spacing = tuple(spacing) if spacing is not None else (1.0,) * ndim
        steps: list[tuple[float, Callable[[Tensor, torch.Generator], Tensor]]] = [
            (config.p_bias_field, self._bias_field),
            (config.p_histogram_shift, self._histogram_shift),
            (config.p_brightness, self._brightness),
            (config.p_contrast, self._contrast),
            (config.p_gamma, self._gamma),
            (config.p_blur, self._blur),
            (config.p_low_resolution, self._low_resolution),
            (config.p_ghosting, self._ghosting),
            (config.p_spike, self._spike),
            (config.p_noise, self._noise),
        ]  # in the order in which a scanner would do it: field and contrast, optics, sampling, noise last
        self._steps = [(p, step) for p, step in steps if p > 0]
        flips = [f"flip-{axis}" for axis in config.flip_axes if config.p_flip > 0]
        moves = [name for name, p in (("affine", config.p_affine), ("elastic", config.p_elastic)) if p > 0]
        self._names = [*moves, *flips, *(step.__name__ for _, step in self._steps)]
        scanner = config.p_bias_field + config.p_histogram_shift + config.p_ghosting + config.p_spike
        self.imports = ("monai.transforms",) if scanner > 0 and config.strength > 0 else ()
        for name in self.imports:  # seconds, which had better not be those of a training step
            importlib.import_module(name)

    def at(self, strength: float) -> Augment:
        """The same transforms at another strength."""
        config = self.config.model_copy(update={"strength": strength})
        return Augment(config, ndim=self.ndim, spacing=self.spacing)

    def field(self, patch: Sequence[int]) -> tuple[int, ...]:
        """The shape to read so that a patch, turned and scaled, seldom looks beyond it."""
        config = self.config
        if config.strength == 0 or not (config.p_affine or config.p_elastic):
            return tuple(patch)
        return tuple(n + 2 * math.ceil(n * _MARGIN) for n in patch)

    def __call__(
        self,
        images: Tensor,
        masks: Tensor | None,
        generator: torch.Generator,
        *,
        size: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Transform a batch on the CPU; the arguments are left as they are.

        Args:
            images: (B, C, *s).
            masks: (B, *s), or None.
            generator: decides everything that is random.
            size: of the answer, centred in what is given and at most as large (see :meth:`field`); None for all of it.

        Returns:
            images (B, C, *size), masks (B, *size) by nearest neighbours with IGNORE out of the field of view.
        """
        config = self.config
        size = tuple(images.shape[2:] if size is None else size)
        if config.strength == 0:
            return _centre(images, size), None if masks is None else _centre(masks, size)
        drawn = self._lot(len(images), generator)
        affine, elastic = drawn("affine", config.p_affine), drawn("elastic", config.p_elastic)
        rows = (affine | elastic).nonzero().flatten()
        whole, whole_masks = images, masks
        images = _centre(whole, size).clone()
        masks = None if whole_masks is None else _centre(whole_masks, size).clone()
        if len(rows):
            grid = self._grid(affine[rows], elastic[rows], whole.shape[2:], size, generator)
            images[rows] = F.grid_sample(whole[rows], grid, padding_mode="border", align_corners=False)
            if masks is not None and whole_masks is not None:
                masks[rows] = _labels_at(whole_masks[rows], grid)
        for axis in config.flip_axes:
            rows = drawn(f"flip-{axis}", config.p_flip).nonzero().flatten()
            if len(rows):
                images[rows] = images[rows].flip(axis + 2)
                if masks is not None:
                    masks[rows] = masks[rows].flip(axis + 1)
        for p, step in self._steps:
            rows = drawn(step.__name__, p).nonzero().flatten()
            if len(rows):
                images[rows] = step(images[rows], generator)
        return images, masks

    def _lot(self, size: int, generator: torch.Generator) -> Callable[[str, float], Tensor]:
        """Which samples (B,) a transform, given with its own probability, takes; to be asked once for each."""
        config = self.config
        if config.policy == "each":
            return lambda _, p: torch.rand(size, generator=generator) < p
        count = 1 if config.policy == "trivial" else min(config.policy_count, len(self._names))
        order = torch.rand(size, len(self._names), generator=generator).argsort(dim=1)
        taken = (order < count) & (torch.rand(size, 1, generator=generator) < config.p_policy)
        columns = dict(zip(self._names, taken.unbind(dim=1), strict=True))
        return lambda name, _: columns.get(name, torch.zeros(size, dtype=torch.bool))

    def _symmetric(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Uniform in -strength..strength."""
        return (torch.rand(shape, generator=generator) * 2 - 1) * self.config.strength

    # geometry

    def _grid(
        self, moved: Tensor, bent: Tensor, field: Sequence[int], size: Sequence[int], generator: torch.Generator
    ) -> Tensor:
        """Where each output pixel looks: (b, *size, ndim) in the field's -1..1, last axis first."""
        theta = torch.eye(self.ndim, self.ndim + 1).repeat(len(moved), 1, 1)
        theta[moved] = self._matrices(int(moved.sum()), size, generator)
        grid = F.affine_grid(theta, [len(moved), 1, *size], align_corners=False)
        if bent.any():
            grid[bent] += self._displacements(int(bent.sum()), size, generator)
        if tuple(field) != tuple(size):
            grid *= torch.tensor([m / n for n, m in zip(field, size, strict=True)]).flip(0)
        return grid

    def _matrices(self, count: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
        """(count, ndim, ndim + 1): from output to input, in ``affine_grid``'s coordinates (-1..1, last axis first)."""
        config, nd, strength = self.config, self.ndim, self.config.strength
        matrix = torch.eye(nd).repeat(count, 1, 1)
        planes = [(a, b) for a in range(nd) for b in range(a + 1, nd)]
        for a, b in planes:
            angle = self._symmetric(generator, count) * math.radians(config.rotate_deg)
            turn = torch.eye(nd).repeat(count, 1, 1)
            turn[:, a, a] = turn[:, b, b] = angle.cos()
            turn[:, a, b], turn[:, b, a] = -angle.sin(), angle.sin()
            matrix = matrix @ turn
        shear = torch.eye(nd).repeat(count, 1, 1)
        for a, b in planes:
            shear[:, a, b] = (self._symmetric(generator, count) * math.radians(config.shear_deg)).tan()
        low, high = (math.log(bound) * strength for bound in config.scale)
        scale = _between(low, high, count, generator).exp()
        matrix = matrix @ shear / scale[:, None, None]  # the map goes from output to input: to magnify, divide
        # from millimetres to voxels to -1..1 along each axis
        half = torch.tensor([n / 2 for n in size])
        extent = half * torch.tensor(self.spacing)
        matrix = matrix * extent[None, None, :] / extent[None, :, None]
        shift = self._symmetric(generator, count, nd, 1) * 2 * config.translate
        return torch.cat([matrix.flip(1, 2), shift.flip(1)], dim=2)

    def _displacements(self, count: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
        """(count, *size, ndim): smooth displacements in -1..1 coordinates, last axis first."""
        knots = _LATTICE + 3
        most = 0.4 * 2 / _LATTICE  # 0.4 lattice spacings, of a field that is 2 wide
        field = self._symmetric(generator, count, self.ndim, *[knots] * self.ndim) * most
        field *= _between(0.25, 1, count, generator).reshape(-1, *[1] * (self.ndim + 1))
        for axis, n in enumerate(size):
            field = torch.tensordot(field, _spline_basis(n), dims=([2], [1]))  # each round moves its axis to the end
            assert field.shape[-1] == n, axis
        return field.movedim(1, -1)

    # intensities: (b, C, *s) of the samples drawn, the caller's own copy

    def _shifts(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(b, C, 1, …) uniform in -strength..strength, alike in all channels but for a small part."""
        common = self._symmetric(generator, len(images), 1)
        own = self._symmetric(generator, len(images), images.shape[1])
        return self._spread_out((1 - _OWN_CHANNEL) * common + _OWN_CHANNEL * own)

    def _spread_out(self, values: Tensor) -> Tensor:
        """(b, C) or (b, 1) with an axis for each spatial one."""
        return values.reshape(*values.shape, *[1] * self.ndim)

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        std, mean = torch.std_mean(images, dim=tuple(range(2, images.ndim)), keepdim=True, correction=0)
        return mean, std

    def _brightness(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images.add_(_BRIGHTNESS * self._shifts(images, generator) * self._moments(images)[1])

    def _contrast(self, images: Tensor, generator: torch.Generator) -> Tensor:
        mean = self._moments(images)[0]
        return images.sub_(mean).mul_(1 + _CONTRAST * self._shifts(images, generator)).add_(mean)

    def _gamma(self, images: Tensor, generator: torch.Generator) -> Tensor:
        low, high = self._range(images)
        width = (high - low).clamp_min(1e-6)
        exponent = self._spread_out((_GAMMA * self._symmetric(generator, len(images), 1)).exp())
        return images.sub_(low).div_(width).clamp_(0, 1).pow_(exponent).mul_(width).add_(low)

    def _range(self, images: Tensor) -> tuple[Tensor, Tensor]:
        axes = tuple(range(2, images.ndim))
        return images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)

    def _noise(self, images: Tensor, generator: torch.Generator) -> Tensor:
        level = _NOISE * self.config.strength * torch.rand(len(images), 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        return images.addcmul_(noise, self._spread_out(level) * self._moments(images)[1])

    def _blur(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Gaussian, separable, as a weighted sum of shifted copies: every sample has a sigma of its own."""
        sigma = self.config.strength * _between(*_BLUR, len(images), generator)
        taps = torch.arange(4) / sigma.clamp_min(1e-3)[:, None]
        kernel = (-0.5 * taps**2).exp()
        kernel /= kernel[:, :1] + 2 * kernel[:, 1:].sum(dim=1, keepdim=True)
        weights = [kernel[:, k].reshape(-1, *[1] * (self.ndim + 1)) for k in range(4)]
        for axis in range(2, images.ndim):
            n = images.shape[axis]
            at = torch.arange(n)
            blurred = images * weights[0]
            for k in range(1, 4):
                before = images.index_select(axis, (at - k).clamp_min(0))
                after = images.index_select(axis, (at + k).clamp_max(n - 1))
                blurred.addcmul_(before.add_(after), weights[k])
            images = blurred
        return images

    def _low_resolution(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Larger pixels, along all axes or, in half of the volumes, along one (thick slices)."""
        mode = {2: "bilinear", 3: "trilinear"}[self.ndim]
        size = list(images.shape[2:])
        draws = torch.rand(len(images), 3, generator=generator).tolist()
        for image, (extent, single, which) in zip(images, draws, strict=True):
            factor = 1 + _LOW_RESOLUTION * self.config.strength * extent
            coarse = [max(1, round(n / factor)) for n in size]
            if self.ndim == 3 and single < 0.5:
                axis = int(which * 3)
                coarse = [coarse[a] if a == axis else n for a, n in enumerate(size)]
            small = F.interpolate(image[None], size=coarse, mode="nearest-exact")
            image.copy_(F.interpolate(small, size=size, mode=mode, align_corners=False)[0])
        return images

    # what scanners do wrong

    def _ghosting(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Motion ghosts (every g-th line of k-space loses signal: replicas along an axis) or truncation ringing."""
        draws = torch.rand(len(images), 4, generator=generator).tolist()
        seeds = _seeds(len(images), generator)
        strength = self.config.strength
        for image, seed, (kind, extent, which, count) in zip(images, seeds, draws, strict=True):
            if kind < 0.5:
                from monai.transforms import RandGibbsNoise

                ringing = RandGibbsNoise(prob=1.0, alpha=(_RINGING[0] * strength, _RINGING[1] * strength))
                image.copy_(_plain(ringing.set_random_state(seed)(image)))
                continue
            axis = 1 + int(which * self.ndim)
            lines = torch.fft.fft(image, dim=axis)
            comb = torch.ones(image.shape[axis])
            comb[:: 2 + int(count * 3)] = 1 - _GHOST * strength * (0.3 + 0.7 * extent)
            comb[0] = 1  # the mean stays
            lines *= comb.reshape(-1, *[1] * (image.ndim - 1 - axis))
            image.copy_(torch.fft.ifft(lines, dim=axis).real)
        return images

    def _spike(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Stripes: one point of k-space, far brighter than it should be."""
        from monai.transforms import RandKSpaceSpikeNoise

        # MONAI's own range goes by the mean of log k-space, in which a spike that can be seen is unlikely to lie
        unit = (self._moments(images)[1].flatten(1) * images[0, 0].numel()).clamp_min(1e-6).log()  # (b, C)
        low, high = (math.log(amplitude) for amplitude in _SPIKE)
        for image, logs, seed in zip(images, unit.tolist(), _seeds(len(images), generator), strict=True):
            spike = RandKSpaceSpikeNoise(prob=1.0, intensity_range=[(at + low, at + high) for at in logs])
            image.lerp_(_plain(spike.set_random_state(seed)(image)), self.config.strength)
        return images

    def _histogram_shift(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A random monotonous curve of intensities, as between scanners or sequences."""
        from monai.transforms import RandHistogramShift

        low, high = self._range(images)
        width = (high - low).flatten(1).amax(dim=1).tolist()
        reach = self.config.strength * _between(*_HISTOGRAM, len(images), generator)
        for image, seed, spread, part in zip(images, _seeds(len(images), generator), width, reach, strict=True):
            if spread > 0:  # MONAI warns of a constant image
                curve = RandHistogramShift(num_control_points=(4, 8), prob=1.0).set_random_state(seed)
                image.lerp_(_plain(curve(image)), part)
        return images

    def _bias_field(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A smooth factor over the image, above its darkest value: normalised images have no zero of their own."""
        from monai.transforms import RandBiasField

        mode = {2: "bilinear", 3: "trilinear"}[self.ndim]
        reach = _BIAS * self.config.strength
        ones = torch.ones(1, *[16] * self.ndim)  # the field is a cubic polynomial: 16 points an axis hold it
        low = self._range(images)[0]
        for image, least, seed in zip(images, low, _seeds(len(images), generator), strict=True):
            field = _plain(RandBiasField(prob=1.0, coeff_range=(-reach, reach)).set_random_state(seed)(ones))
            field = F.interpolate(field[None], size=list(image.shape[1:]), mode=mode, align_corners=True)[0]
            image.sub_(least).mul_(field).add_(least)
        return images


def _centre(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of the last axes."""
    for axis, n in enumerate(size, start=tensor.ndim - len(size)):
        tensor = tensor.narrow(axis, (tensor.shape[axis] - n) // 2, n)
    return tensor


def _between(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _labels_at(masks: Tensor, grid: Tensor) -> Tensor:
    """Labels (b, *size) of masks (b, *s) by nearest neighbours; IGNORE out of the field.

    Beyond the field grid_sample gives 0, so that is what IGNORE is meanwhile.
    """
    shifted = masks[:, None].float() - IGNORE
    labels = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)[:, 0]
    return labels.add_(IGNORE).to(masks.dtype)


def _seeds(count: int, generator: torch.Generator) -> list[int]:
    return [int(seed) for seed in torch.randint(2**31, (count,), generator=generator).tolist()]


def _plain(image: Any) -> Tensor:
    """MONAI's answer without its meta data."""
    tensor: Tensor = image.as_tensor() if hasattr(image, "as_tensor") else torch.as_tensor(image)
    return tensor.float()


def _spline_basis(n: int) -> Tensor:
    """(n, lattice + 3): the cubic B-spline weights of each lattice point at n pixel centres."""
    at = (torch.arange(n) + 0.5) / n * _LATTICE
    distance = (at[:, None] - (torch.arange(_LATTICE + 3) - 1)[None, :]).abs()
    inner = 2 / 3 - distance**2 + distance**3 / 2
    outer = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, inner, outer)
