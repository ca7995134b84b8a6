"""Magnitude pruning: single weights become zero, layer by layer as many as the layer can spare.

Which ones is told by the layer-adaptive score of Lee et al. 2021 (LAMP, arXiv:2010.07611): a weight's square over the
squares of all weights of its layer that are not smaller. One threshold holds for the whole network, and no layer
loses all of its weights: the largest of each scores 1 and is kept whatever the share. The zeros make the file pack
better; dense kernels multiply by them all the same, so that nothing need become faster.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medray.errors import CompressionError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
"""What multiplies by weights that may become zero, or int8."""
SPARSE = 0.01
"""Share of zeros from which a network counts as sparse: by chance no trained weight is exactly zero."""


class Masked(nn.Module):
    """A parametrisation that holds some of a layer's weights at zero.

    Args:
        keep: of the weight's shape, 1 where it lives.
    """

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its zeros."""
        return weight * self.keep


def weighty(model: nn.Module) -> list[nn.Module]:
    """The layers of :data:`LAYERS`, each once."""
    return [layer for layer in model.modules() if isinstance(layer, LAYERS)]


def zero_share(model: nn.Module) -> float:
    """Share of the weights of :func:`weighty` layers that are exactly zero."""
    weights = [_weight(layer) for layer in weighty(model)]
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def sparsify(model: nn.Module, share: float) -> nn.Module:
    """A copy of the network with the ``share`` of its weights that matter least held at zero, ready to be trained on.

    Args:
        model: is left as it is.
        share: of the weights of all convolutions and linear layers, above 0 and below 1.

    Returns:
        The copy; :func:`settled` makes a plain network of it.

    Raises:
        CompressionError: no such layer, or as many zeros are there already.
    """
    if not 0.0 < share < 1.0:
        raise CompressionError(f"--sparsity {share}: the share of weights to become zero must lie between 0 and 1")
    sparse = copy.deepcopy(model).float().cpu().eval()
    layers = weighty(sparse)
    if not layers:
        raise CompressionError(f"{type(model).__name__} has no convolution and no linear layer to take weights from")
    there = zero_share(sparse)
    if there >= share:
        raise CompressionError(f"--sparsity {share:g}: {there:.0%} of the weights are zero already. Ask for more")
    scores = [_lamp(_weight(layer)) for layer in layers]
    flat = torch.cat([score.flatten() for score in scores])
    threshold = flat.kthvalue(max(1, round(share * len(flat)))).values
    for layer, score in zip(layers, scores, strict=True):
        keep = (score > threshold) | (score == 1)
        parametrize.register_parametrization(layer, "weight", Masked(keep.float()), unsafe=True)
    return sparse


def settled(model: nn.Module) -> nn.Module:
    """What :func:`sparsify` gave, trained, as a plain network: the same answers, its zeros written into its weights."""
    for layer in weighty(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


def hold_zeros(model: nn.Module) -> None:
    """Have the zeros of a sparse network stay zero while it trains; of one that isn't sparse, nothing is held."""
    if zero_share(model) < SPARSE:
        return
    for layer in weighty(model):
        keep = (_weight(layer) != 0).float()
        parametrize.register_parametrization(layer, "weight", Masked(keep), unsafe=True)


def _lamp(weight: Tensor) -> Tensor:
    """The score of each weight, above 0 and at most 1; 0 for those that are zero."""
    squares, order = weight.detach().double().square().flatten().sort()
    left = squares.flip(0).cumsum(0).flip(0)  # of it and all larger ones
    scores = torch.empty_like(squares)
    scores[order] = torch.where(squares > 0, squares / left.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return scores.view_as(weight)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
