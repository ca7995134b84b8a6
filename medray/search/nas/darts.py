"""DARTS: a softmax over the operations of each edge, learnt by gradient descent on held-out cases.

Liu, Simonyan and Yang 2019 (arXiv:1806.09055), first and second order. Against the collapse into skip connections:

- every edge has an auxiliary skip whose weight falls from one to nothing, so that the searched skip need not win for
  gradients to flow (DARTS-, Chu et al. 2021, arXiv:2009.01027);
- the weights learn alone at first (P-DARTS, Chen et al. 2019, arXiv:1904.12760);
- a cell keeps at most ``study.nas.most_skips`` skips (P-DARTS). "none" is no operation here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medray.config.genotype import OPERATIONS, Genotype
from medray.search.nas.strategy import DECAY, MOMENTUM, Batch, Problem, Strategy, averaged
from medray.search.nas.supernet import Mix, edges_of
from medray.train.runtime import Runtime

__all__ = ["Darts", "derive", "unrolled_gradient"]

WARM_UP = 0.15
"""Share of the search in which the weights learn alone."""
EDGES = 2
"""Inputs that a node keeps."""


class Darts(Strategy):
    """One step: the architecture by a batch of the held half, then the weights by one of the other."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        draw = torch.Generator().manual_seed(problem.seed)
        shape = (len(edges_of(self.net.nodes)), len(OPERATIONS))
        device = problem.runtime.device
        self.alphas = nn.ParameterDict(
            {kind: nn.Parameter((1e-3 * torch.randn(shape, generator=draw)).to(device)) for kind in self.net.cells}
        )
        # As in DARTS, but for the rate: it has hundreds of steps here, not tens of thousands.
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas.parameters(), lr=problem.config.architecture_lr, betas=(0.5, 0.999), weight_decay=1e-3
        )

    @property
    def architecture(self) -> Mapping[str, Any]:
        return {"alphas": self.alphas, "alpha_optimizer": self.alpha_optimizer}

    def step(self, train: Batch, held: Batch, progress: float) -> dict[str, float]:
        figures: dict[str, float] = {}
        auxiliary = 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if self.problem.config.auxiliary_skip else 0.0
        self.net.board.auxiliary = auxiliary
        if progress >= WARM_UP:
            figures["held_loss"] = self._learn_architecture(train, held)
        self._lay()
        figures["train_loss"] = self.learn_weights(train, progress)
        figures["skips"] = float(sum(op == "skip" for _, op in self._edges(self._genotype(limited=False))))
        return figures

    def finish(self, held: Iterator[Batch]) -> tuple[Genotype, ...]:  # noqa: ARG002 (the softmax has decided)
        return (self._genotype(),)

    def _learn_architecture(self, train: Batch, held: Batch) -> float:
        alphas = list(self.alphas.parameters())
        seen: list[float] = []

        def held_loss() -> Tensor:
            self._lay()
            loss = self.problem.loss(held)
            seen.append(float(loss.detach()))
            return loss

        def train_loss() -> Tensor:
            self._lay()
            return self.problem.loss(train)

        runtime = self.problem.runtime
        if self.problem.config.order == "first":
            gradients = averaged(runtime, torch.autograd.grad(held_loss(), alphas))
        else:
            (group,) = self.optimizer.param_groups
            momenta = [self.optimizer.state[p].get("momentum_buffer") for p in self.weights]
            gradients = unrolled_gradient(
                alphas,
                self.weights,
                train_loss,
                held_loss,
                rate=float(group["lr"]),
                momenta=momenta,
                runtime=runtime,
            )
        for alpha, gradient in zip(alphas, gradients, strict=True):
            alpha.grad = gradient
        self.alpha_optimizer.step()
        return seen[0]

    def _lay(self) -> None:
        """Put all operations of all edges on the board, each with its share."""
        edges = edges_of(self.net.nodes)
        for kind, alpha in self.alphas.items():
            shares = alpha.softmax(-1)
            mix: Mix = [[] for _ in range(self.net.nodes)]
            for (node, source), row in zip(edges, shares, strict=True):
                mix[node].append((source, list(enumerate(row.unbind()))))
            self.net.board.mixes[kind] = mix

    def _genotype(self, *, limited: bool = True) -> Genotype:
        most = self.problem.config.most_skips if limited else None
        return derive(self.net.kind, {kind: alpha.detach() for kind, alpha in self.alphas.items()}, most)

    @staticmethod
    def _edges(genotype: Genotype) -> list[tuple[int, str]]:
        return [edge for nodes in genotype.cells.values() for node in nodes for edge in node]


def derive(kind: str, alphas: Mapping[str, Tensor], most_skips: int | None) -> Genotype:
    """The discrete cells: of each node the two edges whose strongest operation is strongest, with that operation.

    Args:
        kind: of the network.
        alphas: kind of cell to (edges, operations).
        most_skips: in a cell; where there would be more, the weakest loses to the next best choice, until it fits.
    """
    cells = {}
    skip = OPERATIONS.index("skip")
    for name, alpha in alphas.items():
        shares = alpha.softmax(-1).cpu()
        while True:
            nodes = _strongest(shares)
            skips = [row for node in nodes for row, _, op in node if op == skip]
            if most_skips is None or len(skips) <= most_skips:
                break
            shares[min(skips, key=lambda row: float(shares[row, skip])), skip] = 0.0
        cells[name] = [[(source, OPERATIONS[op]) for _, source, op in node] for node in nodes]
    return Genotype.model_validate({"kind": kind, "cells": cells})


def _strongest(shares: Tensor) -> list[list[tuple[int, int, int]]]:
    """(row, input, operation) of each node's edges."""
    nodes: list[list[tuple[int, int, int]]] = []
    row = 0
    while row < len(shares):
        count = len(nodes) + 2
        rows = sorted(range(row, row + count), key=lambda r: (-float(shares[r].max()), r))[:EDGES]
        nodes.append([(r, r - row, int(shares[r].argmax())) for r in sorted(rows)])
        row += count
    return nodes


def unrolled_gradient(
    alphas: Sequence[Tensor],
    weights: Sequence[Tensor],
    train_loss: Callable[[], Tensor],
    held_loss: Callable[[], Tensor],
    *,
    rate: float,
    momenta: Sequence[Tensor | None] | None = None,
    momentum: float = MOMENTUM,
    decay: float = DECAY,
    runtime: Runtime | None = None,
) -> list[Tensor]:
    """The architecture's gradient through one step of the weights (Liu et al. 2019, equations 7 and 8).

    With w' = w - rate (grad_w L_train + decay w + momentum m): grad_a L_held(w', a) - rate * (the mixed second
    derivative of L_train) grad_w' L_held(w', a), the product by a central difference of first derivatives. The weights
    are left as they were.

    Args:
        alphas, weights: leaves that require gradients.
        train_loss, held_loss: at the present values of both.
        rate: of the weights' step.
        momenta: SGD's buffers m; None for none.
        runtime: where several processes share the batches.
    """

    def mean(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if runtime is None else averaged(runtime, tensors)

    kept = [weight.detach().clone() for weight in weights]
    steps = mean(torch.autograd.grad(train_loss(), list(weights)))
    with torch.no_grad():
        for number, (weight, step) in enumerate(zip(weights, steps, strict=True)):
            buffer = momenta[number] if momenta is not None else None
            weight -= rate * (step + decay * weight + (momentum * buffer if buffer is not None else 0.0))
    found = mean(torch.autograd.grad(held_loss(), [*alphas, *weights]))
    direct, ahead = found[: len(alphas)], found[len(alphas) :]
    size = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in ahead])))
    if size == 0.0 or not math.isfinite(size):
        _restore(weights, kept)
        return direct
    reach = 0.01 / size
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for weight, before, part in zip(weights, kept, ahead, strict=True):
                weight.copy_(before + sign * reach * part)
        sides.append(mean(torch.autograd.grad(train_loss(), list(alphas))))
    _restore(weights, kept)
    plus, minus = sides
    return [g - rate * (p - m) / (2 * reach) for g, p, m in zip(direct, plus, minus, strict=True)]


def _restore(weights: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)
