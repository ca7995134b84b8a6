"""A network that says, while it trains, how sure it is of each logit."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LogVariance"]


class LogVariance(nn.Module):
    """Around a network of 2 K outputs: logits and the log-variance of each in training, logits alone otherwise.

    The variance shapes what is learnt (Kendall and Gal 2017, arXiv:1703.04977), so that export, serving and calibration
    see a network like any other.

    Args:
        model: (B, C, *spatial) to (B, 2 K[, *spatial]), or a list of them under deep supervision. The name keeps the
            weights exchangeable with those of the plain network: see :func:`medray.models.weights.load_weights`.
        num_outputs: K.
    """

    def __init__(self, model: nn.Module, num_outputs: int) -> None:
        super().__init__()
        self.model, self.num_outputs = model, num_outputs

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y: Tensor | list[Tensor] = self.model(x)
        if self.training:
            return y
        assert isinstance(y, Tensor)
        return y[:, : self.num_outputs]

    def no_weight_decay(self) -> set[str]:
        """What the network itself names, see :func:`medray.learn.optimizers.parameter_groups`."""
        named = getattr(self.model, "no_weight_decay", None)
        return {f"model.{name}" for name in named()} if callable(named) else set()
