"""One optimiser step: precision, micro-batches, clipping, and what happens when memory or numbers give out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from medray.errors import NonFiniteLossError, OutOfMemoryError
from medray.train.memory import is_out_of_memory
from medray.train.precision import Precision, autocast, memory_format
from medray.train.runtime import Runtime
from medray.train.sharpness import ascended, still_statistics

__all__ = ["Stepper"]

log = logging.getLogger(__name__)
Part = tuple[slice, float]
SKIPS = 25
"""Steps in a row that fp16's scaler may skip before the run counts as diverged: 2^16 halved so often is far below 1."""


class Stepper:
    """Steps an optimiser, batch by batch.

    A batch that is too large for memory is split in halves until it fits, and the split is kept; the gradient stays
    that of the whole batch. Where the loss is not the sum over its parts (Dice over the batch) that takes a second
    forward pass: the loss is derived by the logits of the whole batch first, then each part is run again and given its
    share of that derivative (Gao et al. 2021, arXiv:2101.06983). What can't be equal: dropout draws its masks part by
    part, and batch norm sees each part alone.

    Args:
        model: as the runtime prepared it.
        optimizer: over its parameters.
        criterion: loss of (logits or a list of them, target); with the attribute ``separable`` it takes ``whole`` too.
        runtime: for the device, and to hold gradient exchange back between parts.
        precision: of the forward pass.
        micro_batch: samples at once in memory; None for all.
        largest: samples of a batch that any process has, where several share it; None: as many as this one.
        clip_norm: largest norm of the gradient; 0 for no limit.
        sam_rho: how far uphill the gradient is taken; 0 for where the weights are. Not with fp16.
        channels_last: what :func:`~medray.train.precision.lay_out` said of the model.
        first: handed the first one or two images and the number of samples of a batch, once, before anything is learnt
            from them; under the autocast of training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: nn.Module,
        *,
        runtime: Runtime,
        precision: Precision,
        micro_batch: int | None,
        largest: int | None = None,
        clip_norm: float,
        sam_rho: float = 0.0,
        channels_last: bool,
        first: Callable[[Tensor, int], object] | None = None,
    ) -> None:
        self.model, self.optimizer, self.criterion, self.runtime = model, optimizer, criterion, runtime
        self.precision, self.micro_batch, self.clip_norm = precision, micro_batch, clip_norm
        self.largest, self.sam_rho = largest, sam_rho
        self.channels_last, self._first = channels_last, first
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
        self._skipped = 0

    def __call__(
        self, batch: Mapping[str, Tensor], *, place: Callable[[], str], held: Iterable[nn.Parameter] = ()
    ) -> float:
        """Learn from one batch.

        Args:
            batch: "image" (B, C, *spatial), "target", "index".
            place: where the run is ("step 12 (epoch 2, learning rate 0.01)"), for errors.
            held: parameters that this step leaves alone.

        Returns:
            The loss, before the step.

        Raises:
            NonFiniteLossError: the loss or the gradient is NaN or infinite.
            OutOfMemoryError: not even one sample fits.
        """
        images, targets = self._fetch(batch)
        if self._first is not None:
            with autocast(self.precision, self.runtime.device):
                self._first(images[: min(2, self.micro_batch or 2)], max(len(images), self.largest or 0))
            self._first = None
        random = self._random_state()
        loss = self._gradients_that_fit(images, targets, random, held)
        value = float(loss)
        if not torch.isfinite(loss):
            self._restore(random)
            raise NonFiniteLossError(self._explain(value, batch, images, place()))
        if self.sam_rho:
            self._look_uphill(images, targets, random, held)
        self._scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._tolerate(value, place)
        else:
            self._skipped = 0
            if self.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {"micro_batch": self.micro_batch, "scaler": self._scaler.state_dict(), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        sizes = [size for size in (self.micro_batch, state["micro_batch"]) if size is not None]
        self.micro_batch, self._skipped = min(sizes, default=None), state["skipped"]
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    # -- gradients
    # --------------------------------------------------------------------------------------------------------

    def _look_uphill(self, images: Tensor, targets: Tensor, random: list[Tensor], held: Iterable[nn.Parameter]) -> None:
        """Replace the gradients by those at the point uphill, from the same draws."""
        after = self._random_state()
        with ascended(self._parameters, self.sam_rho), still_statistics(self.model):
            self._restore(random)
            self._gradients_that_fit(images, targets, random, held)
        self._restore(after)

    def _gradients_that_fit(
        self, images: Tensor, targets: Tensor, random: list[Tensor], held: Iterable[nn.Parameter]
    ) -> Tensor:
        while True:
            try:
                loss = self._gradients(images, targets)
                for parameter in held:
                    parameter.grad = None
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            # Outside of `except`: the traceback would keep the failed pass's activations alive.
            self.optimizer.zero_grad(set_to_none=True)
            if self.runtime.device.type == "cuda":
                torch.cuda.empty_cache()
            size = min(self.micro_batch or len(images), len(images))
            if size == 1:
                raise OutOfMemoryError(
                    f"one sample of shape {tuple(images.shape[1:])} does not fit the memory of {self.runtime.device} "
                    f"({cause}); lower train.patch_size or model.feature_size, or choose a smaller model"
                )
            if not self.runtime.is_alone:
                # The others are waiting for this one's gradient: they can only begin anew, together.
                failure = OutOfMemoryError(
                    f"{size} samples at once do not fit the memory of {self.runtime.device} ({cause}); "
                    f"set train.micro_batch={(size + 1) // 2}"
                )
                failure.micro_batch = (size + 1) // 2
                raise failure
            self.micro_batch = (size + 1) // 2
            log.warning("out of memory with %d samples at once: going on with %d", size, self.micro_batch)
            self._restore(random)

    def _gradients(self, images: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._parts(len(images))
        if len(parts) == 1:
            loss: Tensor = self.criterion(self._forward(images), targets)
            self._scaler.scale(loss).backward()
            return loss.detach()
        if not getattr(self.criterion, "separable", False):
            return self._gradients_in_two_passes(images, targets, parts)
        total = torch.zeros((), device=images.device, dtype=torch.float64)
        for part, weight in self._held_back(parts):
            loss = weight * self.criterion(self._forward(images[part]), targets[part], targets)
            self._scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _parts(self, count: int) -> list[Part]:
        """Even parts of a batch, and what each counts for.

        Processes that train together make as many passes each, for they wait for one another in every one: whoever has
        fewer samples than that runs one again, for nothing.
        """
        largest = max(count, self.largest or 0)
        passes = -(-largest // (self.micro_batch or largest))
        edges = [i * count // passes for i in range(passes + 1)]
        return [(slice(a, b), 1.0) if a < b else (slice(0, 1), 0.0) for a, b in pairwise(edges)]

    def _gradients_in_two_passes(self, images: Tensor, targets: Tensor, parts: list[Part]) -> Tensor:
        states, outputs = [], []
        with still_statistics(self.model), torch.no_grad():  # the second pass moves them; once is enough
            for part, weight in parts:
                states.append(self._random_state())
                levels = _levels(self._forward(images[part]))
                outputs.append(levels if weight else [level[:0] for level in levels])
        whole = [torch.cat(level).requires_grad_() for level in zip(*outputs, strict=True)]
        del outputs
        loss: Tensor = self.criterion(whole if len(whole) > 1 else whole[0], targets)
        self._scaler.scale(loss).backward()
        after = self._random_state()  # a loss may draw too, and must not draw the same in the next step
        for (part, weight), state in zip(self._held_back(parts), states, strict=True):
            self._restore(state)
            again = _levels(self._forward(images[part]))
            shares = [weight * level.grad[part] for level in whole if level.grad is not None]
            torch.autograd.backward(again, shares)
        self._restore(after)
        return loss.detach()

    def _held_back(self, parts: list[Part]) -> Iterator[Part]:
        """Each part; gradients are exchanged between ranks with the last one only."""
        with self.runtime.no_sync(self.model):
            yield from parts[:-1]
        yield parts[-1]

    def _forward(self, images: Tensor) -> Any:
        # A context of its own for each pass: autocast's cache of cast weights must not outlive a pass without
        # gradients.
        with autocast(self.precision, self.runtime.device):
            return self.model(images)

    def _fetch(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        images, device = batch["image"], self.runtime.device
        layout = torch.preserve_format
        if self.channels_last:
            layout = memory_format(images.ndim - 2, device, self.precision)
        images = images.to(device, non_blocking=True, memory_format=layout)
        return images, batch["target"].to(device, non_blocking=True)

    # -- random numbers: a repeated pass must draw the same
    # ------------------------------------------------------------------

    def _random_state(self) -> list[Tensor]:
        on_cuda = self.runtime.device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.runtime.device)] if on_cuda else [])]

    def _restore(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self.runtime.device)

    # -- numbers that went wrong
    # ---------------------------------------------------------------------------------------------

    def _tolerate(self, value: float, place: Callable[[], str]) -> None:
        """fp16's scaler skips a step whose gradient overflows and lowers its scale: that is normal, for a while."""
        self._skipped += 1
        if self._scaler.is_enabled() and self._skipped <= SKIPS:
            return
        names = [n for n, p in self.model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        raise NonFiniteLossError(
            f"The gradient became non-finite at {place()} while the loss was still {value:.4g} ({self.precision}); "
            f"first in {', '.join(names[:3])}. Lower optim.lr, or set train.precision=fp32."
        )

    @torch.no_grad()
    def _explain(self, value: float, batch: Mapping[str, Tensor], images: Tensor, place: str) -> str:
        """Which of input, weights, logits and loss was the first that isn't finite."""
        head = f"The loss became {value} at {place} ({self.precision}). "
        broken = [i for i in range(len(images)) if not torch.isfinite(images[i]).all()]
        if broken:
            cases = [int(batch["index"][i]) for i in broken[:5]] if "index" in batch else broken[:5]
            return (
                f"{head}The input was the first that is not finite, in case(s) number {', '.join(map(str, cases))}: "
                "look at these images with `medray check`, or lower augment.strength."
            )
        weights = [n for n, p in self.model.named_parameters() if not torch.isfinite(p).all()]
        if weights:
            return (
                f"{head}The weights were the first that are not finite ({', '.join(weights[:3])}): training diverged. "
                "Lower optim.lr, or raise schedule.warmup."
            )
        size = self.micro_batch or len(images)
        # A pass of one process alone would leave the others waiting.
        for start in range(0, len(images) if self.runtime.is_alone else 0, size):
            if not all(torch.isfinite(level).all() for level in _levels(self._forward(images[start : start + size]))):
                fix = (
                    "lower optim.lr"
                    if self.precision == "fp32"
                    else "set train.precision=bf16 or fp32, or lower optim.lr"
                )
                return f"{head}The logits were the first that are not finite, with input and weights finite: {fix}."
        if not self.runtime.is_alone:
            return f"{head}Input and weights are finite: lower optim.lr, or set train.precision=bf16 or fp32."
        return (
            f"{head}The loss itself was the first that is not finite, with input, weights and logits finite: "
            "look at the targets, and at loss.class_weights and loss.gamma."
        )


def _levels(output: Tensor | list[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
