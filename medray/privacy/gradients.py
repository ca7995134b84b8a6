"""Gradients of single samples, clipped and summed: four ways to the same numbers.

======== ======================================================================= ===================================
hooks    Opacus, layer by layer in one backward pass                             no in-place residuals, no buffers
functorch torch.func over the whole network                                      what vmap can batch
ghost    Opacus' norms without the gradients (Li et al. 2022, arXiv:2110.05679)  as hooks; one batch needs two passes
loop     sample by sample                                                        any network; the fastest on a CPU
======== ======================================================================= ===================================

Clipping is flat: a sample's gradient over all parameters is scaled to a norm of at most ``clip``. Norms are summed in
double precision. A gradient that is not finite counts as zero, so that no sample has a share above ``clip``.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from medray.errors import PrivacyError
from medray.privacy.models import inplace_off

__all__ = ["MODES", "Gradients", "Mode", "SampleLoss", "choose", "make"]

log = logging.getLogger(__name__)

Mode = Literal["hooks", "functorch", "ghost", "loop"]
MODES: tuple[Mode, ...] = ("hooks", "functorch", "ghost", "loop")

SampleLoss = Callable[[Any, Tensor], Tensor]
"""Loss, a scalar, of one sample: the network's output (1, K, ...) or a list of such, and its target (1, ...)."""

ROUNDING = 1e-6
"""Relative; what is left of ``clip`` for the rounding of norms and sums."""
AGREE = 1e-4
"""Largest relative difference from the plain loop with which a way is taken."""


class Gradients(Protocol):
    """One of the ways."""

    parameters: list[nn.Parameter]

    def clipped(self, images: Tensor, targets: Tensor, clip: float) -> list[Tensor]:
        """Sum over samples of clipped gradients, one tensor a parameter; images (B, C, *spatial), B at least 1."""

    def close(self) -> None:
        """Leave the network as it was."""


def make(mode: Mode, model: nn.Module, loss: SampleLoss) -> Gradients:
    """The way of that name for ``model``, which has to be in training mode.

    Raises:
        Exception: whatever a library raises where it can't; :func:`choose` turns that into a reason.
    """
    kinds: dict[Mode, Callable[[nn.Module, SampleLoss], Gradients]] = {
        "hooks": _Hooks,
        "functorch": _Functorch,
        "ghost": _Ghost,
        "loop": _Loop,
    }
    return kinds[mode](model, loss)


def choose(asked: Mode | Literal["auto"], model: nn.Module, loss: SampleLoss, images: Tensor) -> tuple[Mode, Gradients]:
    """The way to go, tried on two samples of noise and held against the plain loop.

    Args:
        asked: a way, or ``auto``: the loop on a CPU, where it is the fastest (small_cnn, 28 pixels, 32 samples, one
            core: loop .88 s, ghost .89, hooks 1.05, functorch 1.16; without clipping .29), and elsewhere the first of
            hooks, functorch and loop that works.
        model: in training mode, on its device.
        images: (B, C, *spatial): only shape, type and device are looked at.

    Raises:
        PrivacyError: the network mixes samples or keeps statistics of them, or the way that was asked for fails.
    """
    probe = torch.randn((2, *images.shape[1:]), dtype=torch.float64, device=images.device)
    expected = _reference(model, probe)
    if asked == "loop" or (asked == "auto" and images.device.type == "cpu"):
        return "loop", make("loop", model, loss)
    reasons = []
    candidates: Sequence[Mode] = ("hooks", "functorch") if asked == "auto" else (asked,)
    for mode in candidates:
        reason = _why_not(mode, model, probe, expected)
        if reason is None:
            return mode, make(mode, model, loss)
        reasons.append(f"{mode}: {reason}")
    if asked == "auto":
        log.info("per-sample gradients one by one, since %s", "; ".join(reasons))
        return "loop", make("loop", model, loss)
    raise PrivacyError(
        f"privacy.mode={asked} does not work with this network ({reasons[0]}). Leave it at auto: the plain loop always "
        "does"
    )


def _pseudo_loss(output: Any, _target: Tensor) -> Tensor:
    levels = [output] if isinstance(output, Tensor) else list(output)
    return torch.stack([level.tanh().square().sum() for level in levels]).sum()


def _still(model: nn.Module) -> nn.Module:
    """A copy whose layers draw nothing at random, in double precision: ways that differ in rounding alone agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(model).double().train()
    for part in twin.modules():
        if "drop" in type(part).__name__.lower():
            part.eval()
    return twin


def _reference(model: nn.Module, probe: Tensor) -> list[Tensor]:
    """Clipped sums by the loop, after making sure that samples are independent and nothing is remembered of them."""
    twin = _still(model)
    with torch.no_grad():
        twin(probe[:1])  # what a network lays out for a shape, once (ConViT's indices), is no statistic
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    loop = _Loop(twin, _pseudo_loss)
    target = torch.zeros(2, device=probe.device)
    expected = loop.clipped(probe, target, 1.0)
    changed = [name for name, buffer in twin.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        raise PrivacyError(
            f"the network keeps statistics of its training images ({', '.join(changed[:3])}), which no noise covers. "
            "Set model.norm=group, or choose another model"
        )
    twin.zero_grad(set_to_none=True)
    together = _pseudo_loss(twin(probe), target)
    alone = sum(_pseudo_loss(twin(probe[i : i + 1]), target) for i in range(2))
    if not torch.allclose(together, torch.as_tensor(alone), rtol=1e-4, atol=1e-6):
        raise PrivacyError(
            "the network mixes the samples of a batch, so that the gradient of one is not its own. Choose another model"
        )
    return expected


def _why_not(mode: Mode, model: nn.Module, probe: Tensor, expected: list[Tensor]) -> str | None:
    """Why a way can't be taken, in a line; None where it can."""
    twin = _still(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way = make(mode, twin, _pseudo_loss)
            found = way.clipped(probe, torch.zeros(2, device=probe.device), 1.0)
    except Exception as error:  # vendors raise anything here
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:120] if text else ''}"
    off = max(float((a - b).norm()) for a, b in zip(found, expected, strict=True))
    size = max(float(b.norm()) for b in expected)
    return None if off <= AGREE * max(size, 1e-6) else f"its gradients are off by {off / max(size, 1e-12):.1%}"


# -- the ways
# --------------------------------------------------------------------------------------------------------------------


class _Way:
    def __init__(self, model: nn.Module, loss: SampleLoss) -> None:
        self.model, self.loss = model, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def samples(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        """Gradients of each sample, (B, *shape) a parameter."""
        raise NotImplementedError

    def clipped(self, images: Tensor, targets: Tensor, clip: float) -> list[Tensor]:
        rows = self.samples(images, targets)
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in rows])
        factor = factors(torch.linalg.vector_norm(norms, dim=0), clip)
        if not bool((factor > 0).all()):
            rows = [g.nan_to_num(0.0, 0.0, 0.0) for g in rows]
        return [torch.einsum("i,i...->...", factor.to(g.dtype), g) for g in rows]

    def close(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def factors(norms: Tensor, clip: float) -> Tensor:
    """What to scale gradients of these norms by; 0 where a norm is not finite."""
    scale = clip * (1 - ROUNDING) / norms.clamp_min(clip)
    return scale.where(norms.isfinite(), 0.0)


class _Loop(_Way):
    def samples(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        rows = [self._one(images[i : i + 1], targets[i : i + 1]) for i in range(len(images))]
        return [torch.stack(grads) for grads in zip(*rows, strict=True)]

    def clipped(self, images: Tensor, targets: Tensor, clip: float) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in self.parameters]
        for i in range(len(images)):
            grads = self._one(images[i : i + 1], targets[i : i + 1])
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads])
            factor = float(factors(torch.linalg.vector_norm(norms), clip))
            if factor > 0:
                torch._foreach_add_(total, grads, alpha=factor)
        return total

    def _one(self, image: Tensor, target: Tensor) -> list[Tensor]:
        loss = self.loss(self.model(image), target)
        grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True)]


class _Functorch(_Way):
    def __init__(self, model: nn.Module, loss: SampleLoss) -> None:
        super().__init__(model, loss)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._rest: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._rest |= dict(model.named_buffers())

        def of_one(trained: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            output = torch.func.functional_call(model, (trained, self._rest), (image.unsqueeze(0),))
            return loss(output, target.unsqueeze(0))

        self._gradient = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0), randomness="different")

    def samples(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")
            found = self._gradient({name: p.detach() for name, p in self._trained.items()}, images, targets)
        return [found[name] for name in self._trained]


class _Hooks(_Way):
    def __init__(self, model: nn.Module, loss: SampleLoss) -> None:
        from opacus.grad_sample import GradSampleModule

        super().__init__(model, loss)
        inplace_off(model)
        self._wrapped = GradSampleModule(model, loss_reduction="sum", strict=True)

    def samples(self, images: Tensor, targets: Tensor) -> list[Tensor]:
        self._wrapped.zero_grad(set_to_none=True)
        per_sample(self.loss, self._wrapped(images), targets).sum().backward()
        rows: list[Any] = [getattr(p, "grad_sample", None) for p in self.parameters]
        self._wrapped.zero_grad(set_to_none=True)
        if any(not isinstance(row, Tensor) for row in rows):
            raise PrivacyError("some parameters lie outside of layers, where hooks don't see them")
        return rows

    def close(self) -> None:
        self._wrapped.to_standard_module()
        super().close()


class _Ghost(_Way):
    def __init__(self, model: nn.Module, loss: SampleLoss) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        super().__init__(model, loss)
        inplace_off(model)
        self._wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", strict=True)

    def clipped(self, images: Tensor, targets: Tensor, clip: float) -> list[Tensor]:
        self._wrapped.zero_grad(set_to_none=True)
        losses = per_sample(self.loss, self._wrapped(images), targets)
        losses.sum().backward(retain_graph=True)
        factor = factors(self._wrapped.get_norm_sample().double(), clip)
        self._wrapped.zero_grad(set_to_none=True)
        if not bool((factor > 0).all()):
            # A product of zero and infinity is none: such a batch goes sample by sample.
            self._wrapped.disable_hooks()
            total = _Loop(self.model, self.loss).clipped(images, targets, clip)
            self._wrapped.enable_hooks()
            return total
        self._wrapped.disable_hooks()
        (factor.to(losses.dtype) * losses).sum().backward()
        self._wrapped.enable_hooks()
        total = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self._wrapped.zero_grad(set_to_none=True)
        return total

    def close(self) -> None:
        self._wrapped.to_standard_module()
        super().close()


def per_sample(loss: SampleLoss, output: Any, targets: Tensor) -> Tensor:
    """Losses (B,), each of one sample alone."""
    values = []
    for i in range(len(targets)):
        part = output[i : i + 1] if isinstance(output, Tensor) else [level[i : i + 1] for level in output]
        values.append(loss(part, targets[i : i + 1]))
    return torch.stack(values)
