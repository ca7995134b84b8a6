"""Genotypes by lot: what a search has to beat, and a stand-in while nothing is found yet."""

from __future__ import annotations

import random

from medray.config.genotype import CELLS, OPERATIONS, Genotype

__all__ = ["random_genotype"]

EDGES = 2


def random_genotype(kind: str, nodes: int, seed: int) -> Genotype:
    """A genotype of ``nodes`` nodes a cell, each of two inputs, all choices equally likely."""
    lot = random.Random(f"{kind}:{nodes}:{seed}")
    cells = {
        name: [
            [(source, lot.choice(OPERATIONS)) for source in sorted(lot.sample(range(node + 2), EDGES))]
            for node in range(nodes)
        ]
        for name in CELLS[kind]
    }
    return Genotype.model_validate({"kind": kind, "cells": cells})
