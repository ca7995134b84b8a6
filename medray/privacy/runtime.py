"""PrivateRuntime: the Runtime under which fit() trains by DP-SGD (Abadi et al. 2016, arXiv:1607.00133).

Each step draws a Poisson sample, clips what each unit adds to the gradient, adds noise, divides by the expected size of
a batch, and hands that to the optimiser. Large samples go through memory in small parts; noise is added once.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from medray.config.privacy import PrivacyConfig
from medray.errors import NonFiniteLossError, OutOfMemoryError, PrivacyError
from medray.learn.losses import Loss
from medray.learn.proximal import attach_proximal
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.gradients import Gradients, choose, per_sample
from medray.privacy.models import refuse_unsound
from medray.privacy.noise import SecureRandom, add_normal
from medray.train.memory import is_out_of_memory
from medray.train.runtime import LocalRuntime, MakeOptimizer
from medray.train.step import Stepper

__all__ = ["PrivateRuntime", "PrivateStepper"]

log = logging.getLogger(__name__)

PHYSICAL_BATCH = 32


class PrivateRuntime(LocalRuntime):
    """One process that trains privately.

    Args:
        plan: noise, rate and steps, from :func:`medray.privacy.accountant.plan_privacy`.
        config: mode, physical batch, and whether randomness is secret.
        device: where the model lies.
        groups: the patient of each training case, in the loader's order; needed where ``plan.unit`` is patient.
        proximal_mu, w_global: FedProx, see :func:`medray.learn.proximal.attach_proximal`.
        done: steps of the plan that were made before (earlier rounds of a federation).
        seed: of the randomness where ``config.secure`` is off: for tests.

    Attributes:
        steps: optimiser steps made by this runtime, of those that ``done`` left.
        mode: how per-sample gradients come about; ``auto`` until the first batch has shown it.
    """

    private = True

    def __init__(
        self,
        plan: PrivacyPlan,
        config: PrivacyConfig,
        *,
        device: torch.device | str = "cpu",
        groups: Sequence[Hashable] | None = None,
        proximal_mu: float = 0.0,
        w_global: Mapping[str, Tensor] | None = None,
        done: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(device)
        if plan.unit == "patient" and groups is None:
            raise PrivacyError("privacy.unit=patient needs the patient of each case; set privacy.unit=record")
        self.plan, self.config, self.done, self.steps = plan, config, done, 0
        self.mode: str = config.mode
        self._groups = groups if plan.unit == "patient" else None
        self._mu, self._anchor = proximal_mu, w_global
        self.random, self._masks = (
            SecureRandom(None if config.secure else hashlib.sha256(f"medray {what} {seed}".encode()).digest())
            for what in ("test", "masks")
        )

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        """As :class:`Runtime` says; the loader's batches become Poisson samples.

        Raises:
            PrivacyError: the network or the loader can't be private.
        """
        refuse_unsound(model)
        model = model.to(self.device)
        optimizer = make_optimizer(model)
        attach_proximal(optimizer, model, self._mu, self._anchor)
        poisson = getattr(train_loader, "poisson", None)
        if poisson is None:
            raise PrivacyError(
                f"{type(train_loader).__name__} can't draw Poisson samples, on which the accountant counts; give it a "
                "method poisson(rate, source, groups=)"
            )
        loader = poisson(self.plan.sample_rate, self.random, groups=self._groups)
        units = getattr(loader, "units", None)
        if units is not None and units != self.plan.units:
            raise PrivacyError(
                f"the loader has {units} {self.plan.unit}s, and noise was planned for {self.plan.units}; plan it anew"
            )
        # Dropout draws sample by sample: from a seed that others know, one patient more would shift the masks of all
        # that come after, and the sum of gradients by more than clip_norm.
        torch.manual_seed(self._masks.seed())
        return model, optimizer, loader

    def criterion(self, loss: nn.Module) -> nn.Module:
        for part in loss.modules():
            if isinstance(part, Loss):
                part.branch_free = True
        if not getattr(loss, "separable", True):
            raise PrivacyError(
                "Dice over the batch (loss.batch_dice) ties its samples together, so that no gradient is one sample's "
                "own. Set loss.batch_dice=false"
            )
        return _PerSample(loss.to(self.device))

    def stepper(self, model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, **how: Any) -> Stepper:
        """What fit() steps with in place of its own."""
        return PrivateStepper(model, optimizer, cast("_PerSample", criterion), private=self, **how)

    def count(self) -> None:
        """One more step is about to be made.

        Raises:
            PrivacyError: it is not in the plan.
        """
        if self.done + self.steps >= self.plan.steps:
            raise PrivacyError(
                f"the plan has {self.plan.steps} private steps, and all are made: another one would spend more than "
                f"epsilon={self.plan.epsilon:.4g}. Lower train.epochs, or plan for more steps"
            )
        self.steps += 1


class _PerSample(nn.Module):
    """The mean over a batch of losses that each see one sample alone."""

    separable = False

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def one(self, output: Any, target: Tensor) -> Tensor:
        """Of one sample."""
        value: Tensor = self.loss(output, target)
        return value

    def forward(self, output: Any, target: Tensor) -> Tensor:
        return per_sample(self.one, output, target).mean()


class PrivateStepper(Stepper):
    """Steps by clipped and noised gradients.

    The loss of private samples is not told to anybody: a call returns NaN. All is computed in single precision, since
    a norm that is off by a bfloat16's last digit would be no bound.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: _PerSample,
        *,
        private: PrivateRuntime,
        **how: Any,
    ) -> None:
        how |= {"precision": "fp32", "clip_norm": 0.0, "first": None}
        super().__init__(model, optimizer, criterion, **how)
        self._private, self._loss = private, criterion.one
        self._way: Gradients | None = None
        self.micro_batch = private.config.physical_batch or self.micro_batch or PHYSICAL_BATCH

    def __call__(
        self, batch: Mapping[str, Tensor], *, place: Callable[[], str], held: Iterable[nn.Parameter] = ()
    ) -> float:
        del held  # what is frozen asks for no gradient, and so gets neither noise nor a step
        images, targets = self._fetch(batch)
        if self._way is None and len(images):
            self._private.mode, self._way = choose(self._private.config.mode, self.model, self._loss, images)
            log.info("per-sample gradients by %s", self._private.mode)
        self._private.count()
        plan = self._private.plan
        parameters, total = self._sum(images, targets, plan.clip_norm)
        std = plan.noise_multiplier * plan.clip_norm
        for parameter, value in zip(parameters, total, strict=True):
            parameter.grad = add_normal(value, std, self._private.random).div_(plan.expected_batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not all(torch.isfinite(p).all() for p in parameters):
            raise NonFiniteLossError(
                f"The weights became non-finite at {place()}: training diverged under its noise. Lower optim.lr, raise "
                "train.batch_size, or allow a larger privacy.epsilon"
            )
        return float("nan")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._private.done = state["private_steps"]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"private_steps": self._private.done + self._private.steps}

    def _sum(self, images: Tensor, targets: Tensor, clip: float) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Clipped gradients, summed over the samples; zeros where there is none."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        while self._way is not None and len(images):
            try:
                total = [torch.zeros_like(p) for p in parameters]
                for start in range(0, len(images), self._size):
                    part = slice(start, start + self._size)
                    torch._foreach_add_(total, self._way.clipped(images[part], targets[part], clip))
                return parameters, total
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            if self._size == 1:
                raise OutOfMemoryError(
                    f"one sample of shape {tuple(images.shape[1:])} does not fit the memory of {self.runtime.device} "
                    f"({cause}); set privacy.mode=loop, or choose a smaller model or image"
                )
            self.micro_batch = (self._size + 1) // 2
            log.warning("out of memory: going on with %d samples at once", self.micro_batch)
        return parameters, [torch.zeros_like(p) for p in parameters]

    @property
    def _size(self) -> int:
        return self.micro_batch or PHYSICAL_BATCH
