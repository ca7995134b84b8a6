"""The super-network: every operation on every edge, of which a strategy says what is computed.

Shape legend: x is (B, C, *spatial).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from medray.config.genotype import CELLS, OPERATIONS, Genotype
from medray.models.cells import NETWORKS, Cell, Place, Plan
from medray.models.layers import BATCH_NORM, InstanceNorm
from medray.models.operations import AveragePool, Norm, operation

__all__ = ["Board", "Mix", "SuperNetwork", "edges_of"]

Mix = list[list[tuple[int, Sequence[tuple[int, Tensor | None]]]]]
"""Of one kind of cell, for each node: inputs, and for each the operations by number with their weights (None: one)."""


@dataclass
class Board:
    """What all cells of a super-network compute in the next pass.

    Attributes:
        mixes: by kind of cell.
        auxiliary: weight of a skip that every computed edge has beside its operations.
    """

    mixes: dict[str, Mix] = field(default_factory=dict)
    auxiliary: float = 0.0


def edges_of(nodes: int) -> list[tuple[int, int]]:
    """(node, input) of all edges of a cell; node 0 is the first after the two inputs."""
    return [(node, source) for node in range(nodes) for source in range(node + 2)]


class SuperNetwork(nn.Module):
    """A network of cells in which nothing is chosen yet. It stays in training mode: statistics are the batch's."""

    def __init__(self, kind: str, plan: Plan) -> None:
        super().__init__()
        self.kind, self.nodes = kind, plan.nodes
        self.board = Board()
        self.network = NETWORKS[kind](lambda place: MixedCell(place, self.board), plan)

    @property
    def cells(self) -> tuple[str, str]:
        """Kinds of its cells."""
        return CELLS[self.kind]

    def choose(self, genotype: Genotype) -> None:
        """Compute what the discrete network of ``genotype`` would, with the shared weights."""
        self.board.auxiliary = 0.0
        self.board.mixes = {
            kind: [[(source, ((OPERATIONS.index(name), None),)) for source, name in node] for node in nodes]
            for kind, nodes in genotype.cells.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        assert isinstance(y, Tensor)
        return y


class MixedCell(Cell):
    """All operations on all edges; the board says which count, and how much."""

    def __init__(self, place: Place, board: Board) -> None:
        place = replace(place, norm=_plain(place.norm, place.ndim), drop_path=0.0)
        super().__init__(place)
        self.kind, self.board = place.kind, board
        strides = [place.stride, place.stride]
        self.edges = nn.ModuleList()
        self.auxiliary = nn.ModuleList()
        for _ in range(place.nodes):
            every = [
                nn.ModuleList(operation(name, place.ndim, place.channels, stride, place.norm) for name in OPERATIONS)
                for stride in strides
            ]
            self.edges.append(nn.ModuleList(every))
            aside = [nn.Identity() if stride == 1 else AveragePool(place.ndim, stride) for stride in strides]
            self.auxiliary.append(nn.ModuleList(aside))
            strides.append(1)

    def combine(self, states: list[Tensor]) -> list[Tensor]:
        every: Any = zip(self.board.mixes[self.kind], self.edges, self.auxiliary, strict=True)  # type: ignore[call-overload]
        for inputs, edges, aside in every:
            parts: list[Tensor] = []
            for source, weighted in inputs:
                x = states[source]
                for number, weight in weighted:
                    y = edges[source][number](x)
                    parts.append(y if weight is None else weight * y)
                if self.board.auxiliary:
                    parts.append(self.board.auxiliary * aside[source](x))
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            states.append(total)
        return states[2:]


def _plain(norm: Norm, ndim: int) -> Norm:
    """Without scale and shift, which would undo an edge's weight (Liu et al. 2019), and without running statistics,
    which would be of no network in particular."""
    if norm is InstanceNorm:

        def still(channels: int) -> nn.Module:
            return InstanceNorm(channels).requires_grad_(False)

        return still
    kind = BATCH_NORM[ndim]
    return lambda channels: kind(channels, affine=False, track_running_stats=False)
