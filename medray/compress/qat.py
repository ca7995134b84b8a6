"""Quantisation-aware training (Jacob et al. 2018, arXiv:1712.05877): a network trains while it computes as int8 will.

Weights and activations are rounded where :func:`~medray.compress.quantize.quantize_static` will round them, and stay
fp32 numbers; gradients pass the rounding as if it weren't there (straight through, Bengio et al. 2013,
arXiv:1308.3432), but for activations beyond their range. Weights: signed, symmetric, per output channel. That is what
folding a batch norm into its convolution leaves as it is, since it scales whole channels; so none is folded here, and
batch norms keep their statistics, as the folded network will. Activations: unsigned, one range for a tensor, what goes
into each layer and what comes out of it, behind its batch norm where one follows. Sums and concatenations are rounded
where a layer takes them in.

After training the plain network is written and quantised as any other is, with ranges measured anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medray.compress.sparsify import hold_zeros, weighty
from medray.errors import CompressionError

_AVERAGING = 0.01
"""How much a batch moves a range, in training."""
_TINY = 1e-12
_NORMS = nn.modules.batchnorm._BatchNorm
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class RoundedWeight(nn.Module):
    """A parametrisation: the weight as signed 8 bits per channel can hold it.

    Args:
        axis: of the output channels.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, fp32; its gradient is the weight's."""
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        scale = weight.detach().abs().amax(others).clamp_min(_TINY) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -127, 127)


class RoundedActivation(nn.Module):
    """An activation as unsigned 8 bits hold it, within a range that follows what is seen in training, with gradients.

    Attributes:
        low, high: of the range, which holds 0.
        measures: the range grows to what is seen, and nothing is rounded.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.measures = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded, and cut at the range's ends."""
        learns = torch.is_grad_enabled()  # a first pass that only sums up shows the same activations
        with torch.no_grad():
            if self.measures or (self.training and learns):
                low, high = x.detach().aminmax()
                if self.measures:
                    self.low.copy_(torch.minimum(self.low, low))
                    self.high.copy_(torch.maximum(self.high, high))
                else:
                    self.low.lerp_(low.clamp_max(0.0).to(self.low.dtype), _AVERAGING)
                    self.high.lerp_(high.clamp_min(0.0).to(self.high.dtype), _AVERAGING)
            if self.measures:
                return x
            scale = ((self.high - self.low) / 255).clamp_min(_TINY)
            zero = (-self.low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


class Rounded(nn.Module):
    """A network that computes as its int8 twin will, and can be trained.

    Args:
        network: fp32; is left as it is. What of it is sparse stays so.
        cases: batches (B, C, *s) as the network will see them, from which the activations' ranges begin.

    Raises:
        CompressionError: no layer to round, or no case.
    """

    def __init__(self, network: nn.Module, cases: Iterable[Tensor]) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).float().cpu().eval()
        layers = weighty(self.network)
        if not layers:
            raise CompressionError(f"{type(network).__name__} has no convolution and no linear layer to quantise")
        given = iter(cases)
        first = next(given, None)
        if first is None:
            raise CompressionError("quantisation-aware training got no calibration case. Give training data")
        behind = _norms_behind(self.network, layers, first)
        hold_zeros(self.network)
        self.ranges = nn.ModuleList()
        self._hooks: list[Any] = []
        for layer in layers:
            rounding = RoundedWeight(int(isinstance(layer, _TRANSPOSED)))
            parametrize.register_parametrization(layer, "weight", rounding, unsafe=True)
            before, after = RoundedActivation(), RoundedActivation()
            self.ranges.extend((before, after))
            self._hooks.append(layer.register_forward_pre_hook(_on_input(before)))
            self._hooks.append(behind.get(layer, layer).register_forward_hook(_on_output(after)))
        self._measure(first, given)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """As of any module; batch norms keep their statistics."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, _NORMS):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        """Logits, or what the network gives in training."""
        return self.network(x)

    def plain(self) -> nn.Module:
        """The network with the weights that it has come to, unrounded; this object is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        for layer in weighty(self.network):
            # Not the rounded ones: where a batch norm is folded in, the quantiser rounds once more.
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        return self.network.eval()

    @torch.no_grad()
    def _measure(self, first: Tensor, others: Iterable[Tensor]) -> None:
        for one in self.ranges:
            one.measures = True  # type: ignore[assignment]  # a plain attribute of RoundedActivation
        self.network(first)
        for case in others:
            self.network(case)
        for one in self.ranges:
            one.measures = False  # type: ignore[assignment]


def _on_input(rounding: RoundedActivation) -> Callable[..., Any]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(arguments[0]), *arguments[1:])

    return hook


def _on_output(rounding: RoundedActivation) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return rounding(output)  # type: ignore[no-any-return]

    return hook


@torch.no_grad()
def _norms_behind(network: nn.Module, layers: list[nn.Module], example: Tensor) -> dict[nn.Module, nn.Module]:
    """The batch norm that takes a layer's output, of layers that have one."""
    made: list[tuple[nn.Module, Tensor]] = []  # the tensors are held, so that no other comes to lie where they do
    found: dict[nn.Module, nn.Module] = {}

    def remember(layer: nn.Module, _: Any, output: Tensor) -> None:
        made.append((layer, output))

    def look(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.update({layer: norm for layer, output in made if output is arguments[0]})

    hooks = [layer.register_forward_hook(remember) for layer in layers]
    hooks += [module.register_forward_pre_hook(look) for module in network.modules() if isinstance(module, _NORMS)]
    try:
        network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found
