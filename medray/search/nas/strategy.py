"""What a strategy is handed, and what it owes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medray.config.genotype import Genotype
from medray.config.schema import NasConfig
from medray.search.nas.supernet import SuperNetwork
from medray.train.precision import Precision, autocast, memory_format
from medray.train.runtime import Runtime

__all__ = ["Batch", "Problem", "Strategy", "average_gradients", "averaged"]

Batch = Mapping[str, Tensor]
WEIGHTS_LR = (0.025, 0.001)
"""Of the shared weights, first and last, by SGD on a cosine; these and the next as in DARTS."""
MOMENTUM, DECAY, CLIP = 0.9, 3e-4, 5.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A super-network and how good it is on a batch.

    Attributes:
        net: on the runtime's device.
        criterion: loss of (logits, target), as the runtime needs it.
        runtime: gradients are averaged through it, so that any number of processes search together.
        precision: of forward passes.
        config: the study's.
        seed: of all that a strategy draws; the same in all processes.
    """

    net: SuperNetwork
    criterion: nn.Module
    runtime: Runtime
    precision: Precision
    config: NasConfig
    seed: int = 0

    def loss(self, batch: Batch) -> Tensor:
        """Of the super-network as its board says, on this process's part of a batch."""
        device = self.runtime.device
        layout = memory_format(batch["image"].ndim - 2, device, self.precision)
        image = batch["image"].to(device, memory_format=layout)
        with autocast(self.precision, device):
            logits = self.net(image)
        loss: Tensor = self.criterion(logits, batch["target"].to(device))
        return loss


class Strategy(ABC):
    """Searches a super-network, step by step.

    In each process of a group the same object makes the same draws and, gradients being averaged, the same steps.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.net = problem, problem.net
        self.weights = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.weights, lr=WEIGHTS_LR[0], momentum=MOMENTUM, weight_decay=DECAY)

    @abstractmethod
    def step(self, train: Batch, held: Batch, progress: float) -> dict[str, float]:
        """Learn from a batch of each half of the training cases.

        Args:
            train: for the weights.
            held: for the architecture.
            progress: 0..1 of the search.

        Returns:
            Figures for the history.
        """

    @abstractmethod
    def finish(self, held: Iterator[Batch]) -> tuple[Genotype, ...]:
        """What was found, best first: ``config.keep`` at most."""

    @property
    def architecture(self) -> Mapping[str, Any]:
        """Further state of the subclass: modules and optimisers by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        kept = {name: part.state_dict() for name, part in self.architecture.items()}
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, part in self.architecture.items():
            part.load_state_dict(state[name])

    def learn_weights(self, batch: Batch, progress: float) -> float:
        """One step of the shared weights, the board being set; the loss before it."""
        high, low = WEIGHTS_LR
        for group in self.optimizer.param_groups:
            group["lr"] = low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(1.0, progress)))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.problem.loss(batch)
        loss.backward()
        average_gradients(self.problem.runtime, self.weights)
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        return float(loss.detach())


def averaged(runtime: Runtime, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean of each tensor over all processes."""
    if runtime.is_alone:
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]).cpu().numpy()
    sums = runtime.reduce({"flat": flat, "number": 1.0})
    mean = torch.from_numpy(sums["flat"] / float(sums["number"])).to(tensors[0].device)
    parts = mean.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def average_gradients(runtime: Runtime, parameters: Sequence[nn.Parameter]) -> None:
    """Give all processes the mean of their gradients; the same parameters have one in each."""
    with_gradient = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    for parameter, gradient in zip(with_gradient, averaged(runtime, gradients), strict=True):
        parameter.grad = gradient
