"""Structured pruning: whole channels go, by Torch-Pruning's dependency graph (Fang et al. 2023, arXiv:2301.12900)."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medray.errors import CompressionError, ModelError
from medray.models.layers import InstanceNorm
from medray.models.narrow import widths_of
from medray.models.variance import LogVariance

ROUND_TO = 8
"""Channels left are a multiple of it: kernels work on blocks of 8 or 16."""
LEAST_GAIN = 0.05
"""Share of the multiplications that must go; less is no pruning."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A smaller network, untrained since.

    Attributes:
        model: in evaluation mode.
        widths: what of it differs from the catalogue's network.
        macs, parameters: before and after; multiplications of one input.
    """

    model: nn.Module
    widths: dict[str, tuple[int, int, int]]
    macs: tuple[float, float]
    parameters: tuple[int, int]


def prune(model: nn.Module, ratio: float, example: Tensor, *, outputs: int, wide: nn.Module | None = None) -> Pruned:
    """Take away the channels with the smallest weights (group L2 norm), the same share of every layer.

    Args:
        model: is left as it is.
        ratio: share of channels to go, above 0 and below 1.
        example: (1, C, *s), one input.
        outputs: K; layers that give so many channels are the network's heads and keep them.
        wide: the catalogue's network where ``model`` was already cut; None where it is that network.

    Raises:
        CompressionError: a network whose channels can't be told apart, or nothing shrank.
    """
    import torch_pruning as tp

    if not 0.0 < ratio < 1.0:
        raise CompressionError(f"--prune {ratio}: the share of channels to take away must lie between 0 and 1")
    small = copy.deepcopy(model).float().cpu().eval()
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        shape = small(example).shape
    ends = {outputs, 2 * outputs} if isinstance(small, LogVariance) else {outputs}
    heads = [
        layer
        for layer in small.modules()
        if (isinstance(layer, nn.modules.conv._ConvNd) and layer.out_channels in ends)
        or (isinstance(layer, nn.Linear) and layer.out_features in ends)
    ]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # the counter prints
            warnings.simplefilter("ignore")
            before = tp.utils.count_ops_and_params(small, example)
            pruner = tp.pruner.BasePruner(
                small,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                ignored_layers=heads,
                round_to=ROUND_TO,
                customized_pruners={InstanceNorm: _norm_pruner()},
            )
            pruner.step()
            after = tp.utils.count_ops_and_params(small, example)
        with torch.no_grad():
            found = small(example)
        widths = widths_of(small, wide if wide is not None else model)
    except Exception as error:  # the library meets networks of every kind, and fails in as many ways
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise CompressionError(
            f"{type(model).__name__} can't be pruned by channels ({reason[:200]}). Leave --prune out, or --distill it "
            "into a smaller network of the catalogue"
        ) from error
    if found.shape != shape or not torch.isfinite(found).all():
        raise CompressionError(f"{type(model).__name__} gives {tuple(found.shape)} once pruned, not {tuple(shape)}")
    if after[0] > before[0] * (1 - LEAST_GAIN):
        raise CompressionError(
            f"pruning {ratio:.0%} of the channels of {type(model).__name__} took away "
            f"{1 - after[0] / before[0]:.1%} of its multiplications: nothing shrank, since layers keep a multiple of "
            f"{ROUND_TO} channels. Prune a wider network, or ask for more"
        )
    return Pruned(
        model=small.eval(),
        widths=widths,
        macs=(float(before[0]), float(after[0])),
        parameters=(int(before[1]), int(after[1])),
    )


def _norm_pruner() -> Any:
    """How the house's own instance norm loses channels."""
    from torch_pruning.pruner.function import BasePruningFunc

    class NormPruner(BasePruningFunc):  # type: ignore[misc]  # the library is untyped
        TARGET_MODULES = InstanceNorm

        def prune_out_channels(self, layer: InstanceNorm, idxs: Sequence[int]) -> nn.Module:
            keep = sorted(set(range(len(layer.weight))) - set(idxs))
            layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
            layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: InstanceNorm) -> int:
            return len(layer.weight)

        get_in_channels = get_out_channels

    return NormPruner()
