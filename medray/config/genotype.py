"""Genotype: what an architecture search finds, as a file and as the name of a model.

A cell has two inputs (numbers 0 and 1) and nodes (2, 3, ...), each the sum of operations on inputs or earlier nodes;
its output is the concatenation of all nodes (Zoph et al. 2018, arXiv:1707.07012; Liu et al. 2019, arXiv:1806.09055).

As a file: ``{"version": 1, "kind": "classification", "cells": {"normal": [[[0, "sep3"], [1, "skip"]], ...], ...}}``.
As a name, which needs no file any more: ``genotype:classification:normal=0.sep3+1.skip,0.dil3+2.conv3:reduce=...``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from medray.config.section import Section
from medray.errors import ConfigError

__all__ = ["CELLS", "OPERATIONS", "PREFIX", "Genotype", "Node", "Operation", "embedded"]

Operation = Literal["skip", "avg3", "max3", "conv3", "sep3", "sep5", "dil3"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
CELLS: dict[str, tuple[str, str]] = {"classification": ("normal", "reduce"), "segmentation": ("down", "up")}
"""Kinds of cells by kind of network: a classifier's keep or halve the resolution, a U-Net's halve or double it."""
PREFIX = "genotype:"
MOST_NODES, MOST_EDGES, MOST_BYTES = 8, 4, 65_536

Edge = tuple[Annotated[int, Field(strict=True, ge=0, le=MOST_NODES)], Operation]
"""Number of the input or node that it comes from, and what is done to it."""
Node = tuple[Edge, ...]

_NAME = re.compile(r"genotype:(classification|segmentation):([a-z]+)=([^:=]+):([a-z]+)=([^:=]+)")
_EDGE = re.compile(r"([0-9])\.([a-z]+[0-9]?)")


class Genotype(Section):
    """A network's cells. Hostile until validated: sizes are bounded, operations are those of a list."""

    version: Literal[1] = 1
    kind: Literal["classification", "segmentation"]
    cells: dict[str, tuple[Node, ...]] = Field(description="kind of cell to its nodes, see CELLS")

    @model_validator(mode="after")
    def _is_a_graph(self) -> Genotype:
        wanted = CELLS[self.kind]
        if tuple(self.cells) != wanted and set(self.cells) != set(wanted):
            raise ValueError(f"cells of a {self.kind} genotype must be {' and '.join(wanted)}, not {list(self.cells)}")
        if len({len(nodes) for nodes in self.cells.values()}) != 1:
            raise ValueError("all cells must have the same number of nodes")
        for name, nodes in self.cells.items():
            if not 1 <= len(nodes) <= MOST_NODES:
                raise ValueError(f"cell {name} has {len(nodes)} nodes; 1 to {MOST_NODES} are allowed")
            for number, node in enumerate(nodes, start=2):
                if not 1 <= len(node) <= MOST_EDGES:
                    raise ValueError(f"node {number} of {name} has {len(node)} inputs; 1 to {MOST_EDGES} are allowed")
                sources = [source for source, _ in node]
                if not all(0 <= source < number for source in sources):
                    raise ValueError(f"node {number} of {name} takes {sources}: it sees 0 to {number - 1} only")
                if len(set(sources)) != len(sources):
                    raise ValueError(f"node {number} of {name} takes {sources}: each once")
        # One order, whatever the file's: equal genotypes have equal names.
        object.__setattr__(self, "cells", {name: self.cells[name] for name in wanted})
        return self

    @property
    def nodes(self) -> int:
        """Of each cell."""
        return len(next(iter(self.cells.values())))

    @property
    def name(self) -> str:
        """The genotype as ``model.name``, whole."""
        cells = ":".join(
            f"{kind}={','.join('+'.join(f'{source}.{op}' for source, op in node) for node in nodes)}"
            for kind, nodes in self.cells.items()
        )
        return f"{PREFIX}{self.kind}:{cells}"

    @classmethod
    def of(cls, name: str) -> Genotype:
        """The genotype that a name of a model holds.

        Raises:
            ConfigError: it holds none.
        """
        found = _NAME.fullmatch(name[:MOST_BYTES])
        try:
            if found is None:
                raise ValueError("it is not of the form genotype:KIND:CELL=NODES:CELL=NODES")
            kind, *parts = found.groups()
            names, cells = parts[::2], [[_node(text) for text in part.split(",")] for part in parts[1::2]]
            if names[0] == names[1]:
                raise ValueError(f"cell {names[0]} stands twice")
            return cls.model_validate({"kind": kind, "cells": dict(zip(names, cells, strict=True))})
        except ValueError as error:
            raise ConfigError(f"model.name={name[:120]!r} holds no genotype: {_first(error)}. Name its file") from None

    @classmethod
    def load(cls, path: Path) -> Genotype:
        """Read ``genotype.json``.

        Raises:
            ConfigError: it isn't there, or isn't one.
        """
        try:
            if not path.is_file():
                raise OSError("no such file")
            with path.open("rb") as file:
                raw = file.read(MOST_BYTES + 1)
            if len(raw) > MOST_BYTES:
                raise ValueError(f"larger than {MOST_BYTES} bytes")
            return cls.model_validate(json.loads(raw.decode("utf-8")))
        except OSError as error:
            raise ConfigError(
                f"model.name: {path}: no genotype can be read there ({error.strerror or error}). Give the "
                "genotype.json that a study with study.nas wrote"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"model.name: {path} is no genotype: {_first(error)}. Give the genotype.json of a study with study.nas"
            ) from None

    def save(self, path: Path) -> None:
        """Write ``genotype.json``; it appears whole or not at all."""
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def embedded(name: Any) -> Any:
    """``genotype:FILE`` to the name that needs no file; anything else as it is.

    Only what a user typed may come here: whoever reads a configuration of somebody else's must open none of his files.

    Raises:
        ConfigError: the file can't be read, or holds no genotype.
    """
    if not isinstance(name, str) or not name.startswith(PREFIX) or _NAME.fullmatch(name):
        return name
    return Genotype.load(Path(name.removeprefix(PREFIX)).expanduser()).name


def _node(text: str) -> list[tuple[int, str]]:
    edges = [_EDGE.fullmatch(part) for part in text.split("+")]
    if not all(edges):
        raise ValueError(f"{text[:40]!r} is no node; write it as 0.sep3+1.skip")
    return [(int(edge[1]), edge[2]) for edge in edges if edge]


def _first(error: BaseException) -> str:
    """What is wrong, in one line that repeats nothing of the input beyond its first characters."""
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])[:60]
        return f"{where + ': ' if where else ''}{problem['msg']}"[:300]
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
