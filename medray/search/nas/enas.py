"""ENAS: an LSTM writes genotypes, and is rewarded by how well the shared weights do with them.

Pham et al. 2018 (arXiv:1802.03268): the discrete networks share the super-network's weights; the controller learns by
REINFORCE (Williams 1992) with a moving-average baseline and an entropy bonus. The reward is exp(-loss) on held-out
cases, in 0..1 whatever the task, as ENAS takes the inverse perplexity for language.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from medray.config.genotype import CELLS, OPERATIONS, Genotype
from medray.search.nas.strategy import Batch, Problem, Strategy

__all__ = ["Controller", "Enas", "Reinforce", "Sample"]

WARM_UP = 0.2
"""Share of the search in which the weights learn alone, each step with a genotype by lot."""
SAMPLES = 4
"""Genotypes that the controller is rewarded for in a step: forward passes only."""
HIDDEN = 64
EDGES = 2
TEMPERATURE, BOUND = 5.0, 2.5
"""Logits are divided by the first and bounded by the second's tanh, as in ENAS: early choices stay open."""
CANDIDATES, BATCHES = 12, 4
"""Genotypes compared in the end, on so many batches each."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A genotype, and how likely the controller was to write it."""

    genotype: Genotype
    log_probability: Tensor
    entropy: Tensor


class Controller(nn.Module):
    """Writes one cell after the other, node by node: an input, another one, an operation for each.

    Args:
        kind: of the network.
        nodes: of a cell.
        generator: of all its draws, so that processes that search together write the same.
    """

    def __init__(self, kind: str, nodes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kind, self.nodes, self.generator = kind, nodes, generator
        self.start = nn.ParameterDict({name: nn.Parameter(torch.empty(HIDDEN)) for name in CELLS[kind]})
        self.sources = nn.Embedding(nodes + 1, HIDDEN)
        self.names = nn.Embedding(len(OPERATIONS), HIDDEN)
        self.lstm = nn.LSTMCell(HIDDEN, HIDDEN)
        self.to_source = nn.Linear(HIDDEN, nodes + 1)
        self.to_name = nn.Linear(HIDDEN, len(OPERATIONS))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)

    def write(self, *, greedy: bool = False) -> Sample:
        """A genotype by lot, or the likeliest choice at each place."""
        state: tuple[Tensor, Tensor] | None = None
        logs: list[Tensor] = []
        entropies: list[Tensor] = []

        def decide(x: Tensor, head: nn.Linear, barred: list[int], among: int) -> int:
            nonlocal state
            state = self.lstm(x.view(1, -1), state)
            assert state is not None
            logits = BOUND * torch.tanh(head(state[0])[0] / TEMPERATURE)
            closed = torch.zeros(len(logits), dtype=torch.bool)
            closed[[*barred, *range(among, len(logits))]] = True
            shares = logits.masked_fill(closed, -torch.inf).log_softmax(-1)
            open_shares = shares[~closed]
            with torch.no_grad():
                weights = shares.exp()
                drawn = weights.argmax() if greedy else torch.multinomial(weights, 1, generator=self.generator)[0]
            logs.append(shares[drawn])
            entropies.append(-(open_shares.exp() * open_shares).sum())
            return int(drawn)

        cells: dict[str, list[list[tuple[int, str]]]] = {}
        for cell in CELLS[self.kind]:
            x = self.start[cell]
            cells[cell] = []
            for node in range(self.nodes):
                edges: list[tuple[int, str]] = []
                for _ in range(EDGES):
                    source = decide(x, self.to_source, [taken for taken, _ in edges], node + 2)
                    x = self.sources.weight[source]
                    name = decide(x, self.to_name, [], len(OPERATIONS))
                    x = self.names.weight[name]
                    edges.append((source, OPERATIONS[name]))
                cells[cell].append(sorted(edges))
        return Sample(
            genotype=Genotype.model_validate({"kind": self.kind, "cells": cells}),
            log_probability=torch.stack(logs).sum(),
            entropy=torch.stack(entropies).sum(),
        )


class Reinforce:
    """Policy gradient with a moving-average baseline and an entropy bonus.

    Args:
        controller: what learns.
        lr: of Adam.
        entropy: weight of the bonus.
        decay: of the baseline.
    """

    def __init__(self, controller: Controller, *, lr: float, entropy: float, decay: float) -> None:
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=lr)
        self.controller, self.entropy, self.decay = controller, entropy, decay
        self.baseline: float | None = None

    def learn(self, samples: list[Sample], rewards: list[float]) -> float:
        """One step by what genotypes were worth; the mean reward."""
        mean = sum(rewards) / len(rewards)
        if self.baseline is None:
            self.baseline = mean
        loss = torch.zeros(())
        for sample, reward in zip(samples, rewards, strict=True):
            loss = loss - (reward - self.baseline) * sample.log_probability - self.entropy * sample.entropy
        self.optimizer.zero_grad(set_to_none=True)
        (loss / len(samples)).backward()
        torch.nn.utils.clip_grad_norm_(self.controller.parameters(), 0.25)
        self.optimizer.step()
        self.baseline = self.decay * self.baseline + (1 - self.decay) * mean
        return mean

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"optimizer": self.optimizer.state_dict(), "baseline": self.baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline = state["baseline"]


class Enas(Strategy):
    """One step: the shared weights by one genotype, then the controller by the rewards of a few others."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        config = problem.config
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.controller = Controller(self.net.kind, self.net.nodes, self.generator)
        self.reinforce = Reinforce(
            self.controller, lr=config.architecture_lr, entropy=config.entropy, decay=config.baseline
        )

    @property
    def architecture(self) -> Mapping[str, Any]:
        return {"controller": self.controller, "reinforce": self.reinforce}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])

    def step(self, train: Batch, held: Batch, progress: float) -> dict[str, float]:
        with torch.no_grad():
            self.net.choose(self.controller.write().genotype)
        figures = {"train_loss": self.learn_weights(train, progress)}
        if progress >= WARM_UP:
            samples = [self.controller.write() for _ in range(SAMPLES)]
            rewards = [self._reward(sample.genotype, [held]) for sample in samples]
            figures["reward"] = self.reinforce.learn(samples, rewards)
            figures["entropy"] = float(torch.stack([sample.entropy.detach() for sample in samples]).mean())
        return figures

    def finish(self, held: Iterator[Batch]) -> tuple[Genotype, ...]:
        """The likeliest genotype and some by lot, by their reward on the same batches."""
        batches = list(islice(held, BATCHES))  # a part of each, where several processes search together
        with torch.no_grad():
            written = [self.controller.write(greedy=number == 0).genotype for number in range(CANDIDATES)]
        # Equal ones once, in order.
        candidates = {genotype.name: genotype for genotype in written}
        worth = {name: self._reward(genotype, batches) for name, genotype in candidates.items()}
        best = sorted(candidates, key=lambda name: -worth[name])
        return tuple(candidates[name] for name in best[: self.problem.config.keep])

    def _reward(self, genotype: Genotype, batches: list[Batch]) -> float:
        """exp(-loss) of the shared weights; the same in all processes."""
        self.net.choose(genotype)
        with torch.no_grad():
            losses = torch.stack([self.problem.loss(batch).float() for batch in batches]).mean()
        runtime = self.problem.runtime
        sums = runtime.reduce({"loss": float(losses), "number": 1.0})
        return float(torch.exp(-torch.tensor(float(sums["loss"]) / float(sums["number"]))))
