"""What the catalogue says of a network, and what a family's builder is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from medray.config.schema import ElasticConfig, ModelConfig
from medray.errors import ModelError
from medray.tasks.catalogue import TASKS

Tier = Literal["lightweight", "balanced", "high-accuracy"]

OPTIONS: Mapping[str, Any] = {
    "feature_size": None,
    "depth": None,
    "dropout": 0.0,
    "dropout_kind": None,
    "drop_path": 0.0,
    "deep_supervision": False,
    "pretrained": None,
    "elastic": ElasticConfig(),
}
"""Fields of ModelConfig that not every network has, with the value that means "not asked for"."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One network to be built; the specification has already been checked against it.

    Attributes:
        in_channels: channels of the input (B, C, *spatial).
        num_outputs: O of the logits (B, O[, *spatial]).
        patch_size: spatial shape that it will be trained on, None when unknown.
        feature_size, depth: the configuration's, or the family's own (0 where the family has none).
        hub: whether weights are to be fetched from the hub while building.
    """

    config: ModelConfig
    ndim: int
    in_channels: int
    num_outputs: int
    patch_size: tuple[int, ...] | None
    feature_size: int
    depth: int
    hub: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """An entry of the catalogue.

    Attributes:
        name: what ``model.name`` says.
        dense: whether it gives logits for each pixel or voxel, or for the image; tasks want one or the other.
        ndims: numbers of spatial axes that it can take.
        tier: lightweight, balanced or high-accuracy.
        family: kin, for grouping in listings.
        description: one line, with the source.
        build: makes the network.
        options: the fields of ModelConfig (see ``OPTIONS``) that it has; others are refused.
        feature_size: width of the first level when the configuration leaves it open; None where it is fixed.
        feature_multiple: ``feature_size`` must be a multiple of this.
        depth: resolution levels per number of axes when the configuration leaves it open; empty where fixed.
        shallowest: least depth that it can have.
        stride: depth to the total stride; every axis of the input must be a multiple of it.
        cells: smallest extent of an axis at the coarsest level.
        hub: whether the hub has weights for it in 2-D.
    """

    name: str
    dense: bool
    ndims: tuple[int, ...]
    tier: Tier
    family: str
    description: str
    build: Callable[[Request], nn.Module]
    options: frozenset[str] = frozenset()
    feature_size: int | None = None
    feature_multiple: int = 1
    depth: Mapping[int, int] = field(default_factory=dict)
    shallowest: int = 2
    stride: Callable[[int], int] = lambda _depth: 1
    cells: int = 1
    hub: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the tasks that it can do."""
        return tuple(name for name, task in TASKS.items() if task.dense == self.dense)

    def divisor(self, config: ModelConfig, ndim: int) -> int:
        """What every spatial axis of the input must be a multiple of. Padding is the caller's work."""
        return self.stride(self.resolved_depth(config, ndim))

    def smallest(self, config: ModelConfig, ndim: int) -> int:
        """The smallest allowed extent of a spatial axis."""
        return self.cells * self.divisor(config, ndim)

    def resolved_depth(self, config: ModelConfig, ndim: int) -> int:
        """Resolution levels: the configuration's, or the family's own; 0 where the family has no such notion."""
        return config.depth or self.depth.get(ndim, 0)

    def fitting_depth(self, shape: tuple[int, ...], *, cells: int = 4, most: int = 6) -> int:
        """The deepest network whose coarsest level still has ``cells`` per axis (nnU-Net's rule, Isensee et al. 2021).

        Args:
            shape: patch size; its axes may be padded up to the divisor.
            cells: extent that the shortest axis keeps at the coarsest level.
            most: never more levels than this.

        Returns:
            a value for ``model.depth``, at least ``shallowest``; 0 where the family has no such field.
        """
        if "depth" not in self.options:
            return 0
        depths = [d for d in range(self.shallowest, most + 1) if min(shape) / self.stride(d) >= cells]
        return max(depths, default=self.shallowest)

    def check(self, config: ModelConfig, *, kind: str, ndim: int, patch_size: tuple[int, ...] | None) -> None:
        """Refuse what this network can't do.

        Raises:
            ModelError: wrong task or number of axes, a field it doesn't have, a width or patch size it can't take.
        """
        if kind not in self.kinds:
            raise ModelError(
                f"model '{self.name}' does {' and '.join(self.kinds)}, not {kind}. "
                f"Choose another: medray models --task {kind}"
            )
        if ndim not in self.ndims:
            has = " and ".join(f"{n}-D" for n in self.ndims)
            raise ModelError(f"model '{self.name}' takes {has} images, not {ndim}-D. Choose another: medray models")
        for name, unset in OPTIONS.items():
            value = getattr(config, name)
            if value != unset and name not in self.options:
                has = ", ".join(sorted(self.options)) or "none of the optional fields"
                raise ModelError(
                    f"model '{self.name}' has no field '{name}' (model.{name}={repr(value)[:60]} was asked). "
                    f"It has: {has}. Leave model.{name} out or choose another model"
                )
        if config.feature_size is not None and config.feature_size % self.feature_multiple:
            fits = -(-config.feature_size // self.feature_multiple) * self.feature_multiple
            raise ModelError(
                f"model.feature_size={config.feature_size} must be a multiple of {self.feature_multiple} for "
                f"'{self.name}'. The next one is {fits}"
            )
        if config.depth is not None and config.depth < self.shallowest:
            raise ModelError(
                f"model.depth={config.depth} is too shallow for '{self.name}': take {self.shallowest} or more"
            )
        if patch_size is not None:
            self._check_patch(config, ndim, patch_size)

    def _check_patch(self, config: ModelConfig, ndim: int, patch_size: tuple[int, ...]) -> None:
        if len(patch_size) != ndim:
            raise ModelError(f"patch_size={patch_size} has {len(patch_size)} axes, the images have {ndim}. Give {ndim}")
        divisor, smallest = self.divisor(config, ndim), self.smallest(config, ndim)
        if any(n % divisor or n < smallest for n in patch_size):
            fits = tuple(max(-(-n // divisor) * divisor, smallest) for n in patch_size)
            lower = ", or lower model.depth" if "depth" in self.options else ""
            raise ModelError(
                f"patch_size={patch_size} does not suit '{self.name}': each axis must be a multiple of {divisor} "
                f"and at least {smallest}. Take {fits}{lower}"
            )
