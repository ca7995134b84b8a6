"""Losses over logits.

Shapes: logits (B, K) or (B, K, *spatial); a list of them, full resolution first, under deep supervision. The
    heteroscedastic losses take (B, 2 K[, *spatial]): logits, then the log-variance of each. Ordinal: (B, K - 1).
Targets: segmentation (B, *spatial) int64; classification and ordinal (B,) int64, or (B, K) float probabilities
    (mixup); multilabel (B, K) float.

All are computed in float32 (float64 where the logits are), whatever autocast says. Where the target is
``ignore_index``, neither value nor gradient arises.

A loss is *separable* if the value of a batch is the sum of the values of its parts, each given the target of the whole
batch: ``loss(x, t) == sum(loss(x_i, t_i, whole=t))``. All are but Dice and Tversky over the batch, whose ratio is
    taken after the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medray.errors import ConfigError

__all__ = [
    "IGNORE",
    "Binary",
    "Loss",
    "NoisySoftmax",
    "NoisySum",
    "Overlap",
    "Softmax",
    "Sum",
    "nearest",
    "one_hot",
]

IGNORE = 255
"""Target where neither loss nor metric looks."""
SMOOTH = 1e-5
LARGEST_LOG_VARIANCE = 10.0
"""Beyond it no gradient flows: exp(10) drowns any logit already."""


def nearest(target: Tensor, shape: Sequence[int]) -> Tensor:
    """``target`` (B, *spatial) int64 sampled at the voxel centres of a coarser grid of ``shape``."""
    if tuple(target.shape[1:]) == tuple(shape):
        return target
    for axis, new in enumerate(shape, start=1):
        old = target.shape[axis]
        # Centre of new voxel i lies at (i + 1/2) * old / new - 1/2; integers keep it exact and alike on every device.
        index = ((2 * torch.arange(new, device=target.device) + 1) * old) // (2 * new)
        target = target.index_select(axis, index)
    return target


class Loss(nn.Module):
    """Base: unfolds deep supervision (weights 1, 1/2, 1/4, ... that sum to one) and leaves autocast."""

    separable = True
    branch_free = False
    """Let no value decide what is computed, as torch.func.vmap needs it; a little slower."""

    def __init__(self, ignore_index: int, weights: Tensor | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, whole: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: see the head of this file.
            target: see the head of this file.
            whole: the target of the whole batch where ``target`` is a part of it; means are then over the whole.
        """
        levels = [logits] if isinstance(logits, Tensor) else list(logits)
        whole = target if whole is None else whole
        precise = torch.promote_types(levels[0].dtype, torch.float32)
        total = levels[0].new_zeros((), dtype=precise)
        scale = sum(0.5**level for level in range(len(levels)))
        with torch.autocast(levels[0].device.type, enabled=False):
            for level, values in enumerate(levels):
                part, all_of_it = target, whole
                if level:
                    part, all_of_it = nearest(target, values.shape[2:]), nearest(whole, values.shape[2:])
                total = total + (0.5**level / scale) * self.term(values.to(precise), part, all_of_it)
        return total

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        """The loss of one level: logits (B, K, *spatial) in full precision, and their target."""
        raise NotImplementedError

    def known(self, target: Tensor) -> Tensor:
        """Where the target is not ignored: bool of its shape."""
        return target != self.ignore_index


class Softmax(Loss):
    """Cross-entropy, or focal loss where ``gamma`` > 0 (Lin et al. 2017, arXiv:1708.02002): one class per sample or
    voxel.

    The mean is weighted by the target's class weight, as PyTorch's cross-entropy does it.
    """

    def __init__(
        self, ignore_index: int, weights: Tensor | None, *, smoothing: float = 0.0, gamma: float = 0.0
    ) -> None:
        super().__init__(ignore_index, weights)
        self.smoothing, self.gamma = smoothing, gamma

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        if target.is_floating_point():
            weights = torch.ones_like(logits[0]) if self.weights is None else self.weights
            probabilities = target * (1 - self.smoothing) + self.smoothing / logits.shape[1]
            log_p = logits.log_softmax(1)
            return -(weights * probabilities * self.focus(log_p) * log_p).sum() / (weights * whole).sum().clamp_min(
                1e-12
            )
        if self.gamma == 0:
            value = F.cross_entropy(
                logits,
                target,
                self.weights,
                ignore_index=self.ignore_index,
                label_smoothing=self.smoothing,
                reduction="sum",
            )
            return value / self.mass(whole)
        log_p = logits.log_softmax(1)
        terms = -self.focus(log_p) * log_p
        picked = terms.gather(1, target.where(self.known(target), 0).unsqueeze(1)).squeeze(1)
        scale = (
            self.weights[target.where(self.known(target), 0)] if self.weights is not None else torch.ones_like(picked)
        )
        value = scale * picked
        if self.smoothing:
            spread = terms if self.weights is None else terms * self.weights.view(-1, *[1] * (terms.ndim - 2))
            value = (1 - self.smoothing) * value + self.smoothing * spread.mean(1)
        return value.where(self.known(target), 0).sum() / self.mass(whole)

    def focus(self, log_p: Tensor) -> Tensor:
        """(1 - p) ** gamma, by a form whose gradient stays finite at p = 1."""
        if self.gamma == 0:
            return torch.ones((), device=log_p.device)
        return (-torch.expm1(log_p)).clamp_min(1e-12) ** self.gamma

    def mass(self, target: Tensor) -> Tensor:
        """Sum of class weights over the known targets; tiny rather than zero where all are ignored."""
        known = self.known(target)
        if self.weights is None:
            return known.sum().clamp_min(1).float()
        return self.weights[target.where(known, 0)].where(known, 0.0).sum().clamp_min(1e-12)


class Binary(Loss):
    """Each class against the rest by a sigmoid: binary cross-entropy, or focal loss where ``gamma`` > 0."""

    def __init__(
        self,
        ignore_index: int,
        weights: Tensor | None,
        *,
        smoothing: float = 0.0,
        gamma: float = 0.0,
    ) -> None:
        super().__init__(ignore_index, weights)
        self.smoothing, self.gamma = smoothing, gamma

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        known = self.known(target)
        if not target.is_floating_point():
            truth = one_hot(target.where(known, 0), logits.shape[1])
            known = known.unsqueeze(1).expand_as(truth)
        else:
            truth = target.where(known, 0.0)
        truth = truth * (1 - self.smoothing) + 0.5 * self.smoothing
        positive = None if self.weights is None else self.weights.view(-1, *[1] * (logits.ndim - 2))
        value = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=positive, reduction="none")
        if self.gamma:
            p = logits.sigmoid()
            miss = (truth * (1 - p) + (1 - truth) * p).clamp_min(1e-12)
            value = miss**self.gamma * value
        count = self.known(whole).sum() * (1 if whole.is_floating_point() else logits.shape[1])
        return value.where(known, 0).sum() / count.clamp_min(1)


class Overlap(Loss):
    """1 - Tversky index of the foreground classes (Salehi et al. 2017, arXiv:1706.05721); alpha = beta = 1/2 is soft
    Dice.

    Index = TP / (TP + alpha FP + beta FN), sums over the batch's voxels (``over_batch``: steadier where a class is
    rare) or over each sample's; mean over classes. A sum of the batch makes the loss inseparable.

    Attributes:
        total: adds to this process's sums of the batch those of the others that hold parts of it, differentiably;
            None where one process has all of it.
        parts: processes that share the batch; each gives its part of the loss, which is their sum.
    """

    total: Callable[[Tensor], Tensor] | None = None
    parts: int = 1

    def __init__(
        self,
        ignore_index: int,
        weights: Tensor | None,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        over_batch: bool = True,
    ) -> None:
        super().__init__(ignore_index, weights)
        self.alpha, self.beta, self.over_batch = alpha, beta, over_batch
        self.separable = not over_batch

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        return self.of_probabilities(logits.softmax(1), target, whole)

    def of_probabilities(self, probabilities: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        """The loss of probabilities (B, K, *spatial), so that a sum of losses computes its softmax once."""
        known = self.known(target)
        truth = one_hot(target.where(known, 0), probabilities.shape[1])[:, 1:]
        p = probabilities[:, 1:]
        if self.branch_free or not bool(known.all()):
            truth = truth * known.unsqueeze(1)
            p = p * known.unsqueeze(1)
        axes = (0, *range(2, p.ndim)) if self.over_batch else tuple(range(2, p.ndim))
        sums = torch.stack([(p * truth).sum(axes), p.sum(axes), truth.sum(axes)])
        if self.over_batch and self.total is not None:
            sums = self.total(sums)
        hit, guessed, there = sums.unbind()
        wrong = self.alpha * (guessed - hit) + self.beta * (there - hit)
        index = (hit + SMOOTH) / (hit + wrong + SMOOTH)
        if self.weights is None:
            miss = (1 - index).mean(-1)
        else:
            share = self.weights[1:]
            miss = ((1 - index) * share).sum(-1) / share.sum()
        return miss / self.parts if self.over_batch else miss.sum() / whole.shape[0]


class Sum(Loss):
    """Dice + cross-entropy, sharing one softmax."""

    def __init__(self, ignore_index: int, overlap: Overlap, entropy: Softmax) -> None:
        super().__init__(ignore_index)
        self.overlap, self.entropy = overlap, entropy
        self.separable = overlap.separable

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        return self.of_log_probabilities(logits.log_softmax(1), target, whole)

    def of_log_probabilities(self, log_p: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        """The loss of log-probabilities (B, K, *spatial)."""
        entropy = F.nll_loss(log_p, target, self.entropy.weights, ignore_index=self.ignore_index, reduction="sum")
        if self.entropy.smoothing:
            spread = (
                log_p
                if self.entropy.weights is None
                else log_p * self.entropy.weights.view(-1, *[1] * (log_p.ndim - 2))
            )
            even = -spread.mean(1).where(self.known(target), 0).sum()
            entropy = (1 - self.entropy.smoothing) * entropy + self.entropy.smoothing * even
        return entropy / self.entropy.mass(whole) + self.overlap.of_probabilities(log_p.exp(), target, whole)


class NoisySoftmax(Softmax):
    """Cross-entropy of the mean probability under Gaussian noise on the logits, whose variance the network gives too.

    Where the labels can't be known the network learns a large variance, which takes weight off those samples or voxels
    (Kendall and Gal 2017, arXiv:1703.04977, section 3.3).
    """

    def __init__(
        self, ignore_index: int, weights: Tensor | None, num_classes: int, *, smoothing: float = 0.0, samples: int = 8
    ) -> None:
        super().__init__(ignore_index, weights, smoothing=smoothing)
        self.num_classes, self.samples = num_classes, samples

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        # log_softmax of a log-probability is itself, so the cross-entropy sees the same values.
        return super().term(noisy_log_probabilities(logits, self.num_classes, self.samples), target, whole)


class NoisySum(Sum):
    """Dice and cross-entropy of the mean probability under noise, see :class:`NoisySoftmax`."""

    def __init__(
        self, ignore_index: int, overlap: Overlap, entropy: Softmax, num_classes: int, *, samples: int = 8
    ) -> None:
        super().__init__(ignore_index, overlap, entropy)
        self.num_classes, self.samples = num_classes, samples

    def term(self, logits: Tensor, target: Tensor, whole: Tensor) -> Tensor:
        log_p = noisy_log_probabilities(logits, self.num_classes, self.samples)
        return self.of_log_probabilities(log_p, target, whole)


def noisy_log_probabilities(outputs: Tensor, num_classes: int, samples: int) -> Tensor:
    """Log of the mean over ``samples`` of softmax(logits + noise): (B, 2 K, *spatial) to (B, K, *spatial).

    Draws come in opposite pairs, which halves what the estimate varies by. They are of PyTorch's own generator.

    Raises:
        ConfigError: another number of channels: the network has no log-variances.
    """
    if outputs.shape[1] != 2 * num_classes:
        raise ConfigError(
            f"the heteroscedastic losses need a log-variance beside each of {num_classes} logits, and the network "
            f"gives {outputs.shape[1]} channels; build it with model.log_variance=true"
        )
    logits, log_variance = outputs.chunk(2, dim=1)
    deviation = (0.5 * log_variance.clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE)).exp()
    total: Tensor | None = None
    noise = torch.zeros_like(logits)
    for sample in range(samples):
        noise = -noise if sample % 2 else torch.randn_like(logits)
        found = (logits + deviation * noise).log_softmax(1)
        total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return total - math.log(samples)


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """(B, *spatial) int64 to (B, K, *spatial) float32; torch's own makes int64 eight bytes wide."""
    shape = (target.shape[0], num_classes, *target.shape[1:])
    return target.new_zeros(shape, dtype=torch.float32).scatter_(1, target.unsqueeze(1), 1.0)
