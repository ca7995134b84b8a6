"""``genotype:...``: networks whose cells an architecture search found (see :mod:`medray.config.genotype`)."""

from __future__ import annotations

from functools import lru_cache

from torch import nn

from medray.config.genotype import PREFIX, Genotype
from medray.errors import ConfigError, ModelError
from medray.models.cells import NETWORKS, Cell, GenotypeCell, Place, Plan
from medray.models.spec import ModelSpec, Request

__all__ = ["FAMILY", "any_genotype", "build_genotype", "plan_of"]

FAMILY = "searched"
_WIDTH = {"classification": 12, "segmentation": 8}
"""Channels of a node at the finest level; a cell gives as many for each of its nodes."""


def plan_of(request: Request, nodes: int) -> Plan:
    """How large the network is that a configuration asks for."""
    config = request.config
    return Plan(
        ndim=request.ndim,
        in_channels=request.in_channels,
        num_outputs=request.num_outputs,
        nodes=nodes,
        width=request.feature_size,
        depth=request.depth,
        extent=max(request.patch_size) if request.patch_size else None,
        dropout=config.dropout,
        drop_path=config.drop_path,
        deep_supervision=config.deep_supervision,
    )


def build_genotype(request: Request, genotype: Genotype) -> nn.Module:
    """The discrete network."""

    def make(place: Place) -> Cell:
        return GenotypeCell(place, genotype.cells[place.kind])

    return NETWORKS[genotype.kind](make, plan_of(request, genotype.nodes))


@lru_cache(maxsize=256)
def any_genotype(text: str) -> ModelSpec:
    """The entry ``genotype:TEXT``.

    Raises:
        ModelError: the text holds no genotype.
    """
    try:
        genotype = Genotype.of(f"{PREFIX}{text}")
    except ConfigError as error:
        raise ModelError(str(error)) from None
    segments = genotype.kind == "segmentation"
    options = {"feature_size", "depth", "dropout", "drop_path", "pretrained"}
    options |= {"dropout_kind", "deep_supervision"} if segments else set()
    return ModelSpec(
        name=f"{PREFIX}{text}",
        dense=segments,
        ndims=(2, 3),
        tier="balanced",
        family=FAMILY,
        description=f"cells of {genotype.nodes} nodes that an architecture search found",
        build=lambda request: build_genotype(request, genotype),
        options=frozenset(options),
        feature_size=_WIDTH[genotype.kind],
        depth={2: 5, 3: 4} if segments else {2: 3, 3: 3},
        stride=_halvings if segments else _none,
        cells=2 if segments else 16,
    )


def _halvings(depth: int) -> int:
    return int(2 ** (depth - 1))


def _none(_depth: int) -> int:
    return 1
