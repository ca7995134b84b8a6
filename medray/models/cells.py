"""Networks of cells: where cells stand and what they are handed. What is within one is somebody else's.

A discrete network puts a :class:`GenotypeCell` in each place, a search a cell in which all choices are open.

Shape legend: x is (B, C, *spatial); level 0 is the finest, each further one half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from medray.config.genotype import CELLS, Node, Operation
from medray.models.layers import CONV, LINEAR_MODE, SLOPE, ConvBlock, DropPath, initialise, widths
from medray.models.operations import AveragePool, Norm, norm_of, operation, project
from medray.models.small import PooledHead

__all__ = ["Cell", "CellClassifier", "CellUNet", "GenotypeCell", "MakeCell", "Place", "Plan"]

FINE = {2: 64, 3: 24}
"""The largest extent of an axis on which a classifier's cells work; the stem brings larger images down to it."""

Fit = Literal["same", "down", "up"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a cell stands.

    Attributes:
        kind: of the cell, see :data:`medray.config.genotype.CELLS`.
        ndim: spatial axes.
        inputs: channels of the two inputs.
        fits: how each input is brought to the resolution at which the cell works.
        channels: of each node.
        stride: of operations on the two inputs.
        nodes: in the cell; it gives ``nodes * channels``.
        norm: makes normalisations.
        drop_path: share of samples for which an operation is left out.
    """

    kind: str
    ndim: int
    inputs: tuple[int, int]
    fits: tuple[Fit, Fit]
    channels: int
    stride: int
    nodes: int
    norm: Norm
    drop_path: float = 0.0


class Cell(nn.Module):
    """Two inputs, brought to one shape; the nodes are the subclass's."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.fits = nn.ModuleList(
            _fit(place.ndim, inputs, place.channels, fit, place.norm)
            for inputs, fit in zip(place.inputs, place.fits, strict=True)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        states = [fit(x) for fit, x in zip(self.fits, (first, second), strict=True)]
        return torch.cat(self.combine(states), dim=1)

    def combine(self, states: list[Tensor]) -> list[Tensor]:
        """The nodes' maps, from those of the two inputs."""
        raise NotImplementedError


MakeCell = Callable[[Place], Cell]


class GenotypeCell(Cell):
    """A cell whose choices are made."""

    def __init__(self, place: Place, nodes: Sequence[Node]) -> None:
        super().__init__(place)
        self.sources = [[source for source, _ in node] for node in nodes]
        self.operations = nn.ModuleList(
            nn.ModuleList(_edge(place, source, name) for source, name in node) for node in nodes
        )

    def combine(self, states: list[Tensor]) -> list[Tensor]:
        for sources, operations in zip(self.sources, self.operations, strict=True):
            parts = [op(states[source]) for source, op in zip(sources, operations, strict=True)]  # type: ignore[call-overload]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            states.append(total)
        return states[2:]


def _edge(place: Place, source: int, name: Operation) -> nn.Module:
    made = operation(name, place.ndim, place.channels, place.stride if source < 2 else 1, place.norm)
    if place.drop_path and not isinstance(made, nn.Identity):
        return nn.Sequential(made, DropPath(place.drop_path))
    return made


class _Up(nn.Module):
    """Twice the resolution, by linear interpolation."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.mode = LINEAR_MODE[ndim]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2.0, mode=self.mode, align_corners=False)


def _fit(ndim: int, inputs: int, outputs: int, fit: Fit, norm: Norm) -> nn.Module:
    made = project(ndim, inputs, outputs, norm)
    if fit == "same":
        return made
    return nn.Sequential(AveragePool(ndim, 2), made) if fit == "down" else nn.Sequential(made, _Up(ndim))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Size of a network of cells.

    Attributes:
        ndim: spatial axes.
        in_channels, num_outputs: of the network.
        nodes: of a cell.
        width: channels of a node at level 0.
        depth: levels.
        repeats: cells of a level (classifiers).
        extent: the largest axis of the images, None for unknown (classifiers).
        dropout, drop_path: shares; the latter rises linearly to the last cell.
        deep_supervision: heads on all but the coarsest decoded level (U-Nets).
    """

    ndim: int
    in_channels: int
    num_outputs: int
    nodes: int
    width: int
    depth: int
    repeats: int = 2
    extent: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    deep_supervision: bool = False


class CellClassifier(nn.Module):
    """A stem, cells at falling resolution, a normalised and pooled head.

    Level 0 has normal cells, each further begins with one that halves the resolution, as in NASNet and DARTS. A cell
    sees the outputs of the last two.
    """

    def __init__(self, make: MakeCell, plan: Plan) -> None:
        super().__init__()
        norm = norm_of("classification", plan.ndim)
        channels = widths(plan.width, plan.depth, plan.ndim)
        inputs, layers = plan.in_channels, list[nn.Module]()
        for stride in _stem_strides(plan):
            outputs = plan.nodes * plan.width
            layers += [nn.LeakyReLU(SLOPE)] if layers else []
            layers += [CONV[plan.ndim](inputs, outputs, 3, stride, 1, bias=False), norm(outputs)]
            inputs = outputs
        self.stem = nn.Sequential(*layers)
        kinds = [(level, level > 0 and cell == 0) for level in range(plan.depth) for cell in range(plan.repeats)]
        given, fresh = [inputs, inputs], True  # channels of the last two outputs, whether they are equally large
        self.cells = nn.ModuleList()
        for number, (level, halves) in enumerate(kinds):
            place = Place(
                kind="reduce" if halves else "normal",
                ndim=plan.ndim,
                inputs=(given[0], given[1]),
                fits=("same" if fresh else "down", "same"),
                channels=channels[level],
                stride=2 if halves else 1,
                nodes=plan.nodes,
                norm=norm,
                drop_path=plan.drop_path * number / max(1, len(kinds) - 1),
            )
            self.cells.append(make(place))
            given, fresh = [given[1], plan.nodes * channels[level]], not halves
        # A node is a sum, of skips too, so that its scale grows from node to node: the head sees it normalised.
        pooled = PooledHead(given[1], plan.num_outputs, plan.dropout)
        self.head = nn.Sequential(norm(given[1]), nn.LeakyReLU(SLOPE), pooled)

    def forward(self, x: Tensor) -> Tensor:
        first = second = self.stem(x)
        for cell in self.cells:
            first, second = second, cell(first, second)
        return self.head(second)


def _stem_strides(plan: Plan) -> list[int]:
    strides, extent = [1], plan.extent or 0
    while extent > FINE[plan.ndim]:
        strides[-1] = 2
        strides.append(1)
        extent = -(-extent // 2)
    return strides if len(strides) == 1 else strides[:-1]


class CellEncoder(nn.Module):
    """Two convolutions at full resolution, then a ``down`` cell for each further level."""

    def __init__(self, make: MakeCell, plan: Plan, channels: Sequence[int]) -> None:
        super().__init__()
        finest = plan.nodes * channels[0]
        self.first = ConvBlock(plan.ndim, plan.in_channels, finest, dropout=plan.dropout)
        self.second = ConvBlock(plan.ndim, finest, finest, dropout=plan.dropout)
        self.cells = nn.ModuleList()
        given = [finest, finest]
        for level in range(1, plan.depth):
            place = Place(
                kind="down",
                ndim=plan.ndim,
                inputs=(given[0], given[1]),
                fits=("same" if level == 1 else "down", "same"),
                channels=channels[level],
                stride=2,
                nodes=plan.nodes,
                norm=norm_of("segmentation", plan.ndim),
                drop_path=plan.drop_path * level / (2 * plan.depth - 2),
            )
            self.cells.append(make(place))
            given = [given[1], plan.nodes * channels[level]]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all levels, full resolution first."""
        first = self.first(x)
        features = [self.second(first)]
        for cell in self.cells:
            features.append(cell(first, features[-1]))
            first = features[-2]
        return features


class CellDecoder(nn.Module):
    """An ``up`` cell for each level, handed the coarser map and the skip."""

    def __init__(self, make: MakeCell, plan: Plan, channels: Sequence[int]) -> None:
        super().__init__()
        self.deep_supervision = plan.deep_supervision
        decoded = plan.depth - 1
        self.cells = nn.ModuleList(
            make(
                Place(
                    kind="up",
                    ndim=plan.ndim,
                    inputs=(plan.nodes * channels[level + 1], plan.nodes * channels[level]),
                    fits=("up", "same"),
                    channels=channels[level],
                    stride=1,
                    nodes=plan.nodes,
                    norm=norm_of("segmentation", plan.ndim),
                    drop_path=plan.drop_path * (2 * plan.depth - 2 - level) / (2 * plan.depth - 2),
                )
            )
            for level in range(decoded)
        )
        heads = max(1, decoded - 1) if plan.deep_supervision else 1
        norm = norm_of("segmentation", plan.ndim)
        self.heads = nn.ModuleList(
            nn.Sequential(norm(inputs), nn.LeakyReLU(SLOPE), CONV[plan.ndim](inputs, plan.num_outputs, 1))
            for inputs in (plan.nodes * channels[level] for level in range(heads))
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits; with deep supervision in training, of several levels, full resolution first."""
        *skips, x = features
        every = self.deep_supervision and self.training
        outputs: list[Tensor] = []
        for level in reversed(range(len(skips))):
            x = self.cells[level](x, skips[level])
            if level == 0 or (every and level < len(self.heads)):
                outputs.append(self.heads[level](x))
        return outputs[::-1] if every else outputs[-1]


class CellUNet(nn.Module):
    """An encoder and a decoder of cells, as NAS-Unet's (Weng et al. 2019, doi:10.1109/ACCESS.2019.2908991).

    The full resolution is encoded by two plain convolutions: cells there would cost more than all others together.
    """

    def __init__(self, make: MakeCell, plan: Plan) -> None:
        super().__init__()
        channels = widths(plan.width, plan.depth, plan.ndim)
        self.encoder, self.decoder = CellEncoder(make, plan, channels), CellDecoder(make, plan, channels)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.decoder(self.encoder(x))


NETWORKS: dict[str, type[CellClassifier] | type[CellUNet]] = {
    "classification": CellClassifier,
    "segmentation": CellUNet,
}
assert NETWORKS.keys() == CELLS.keys()
