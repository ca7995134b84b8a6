"""Which networks train under differential privacy, and what is changed about them before."""

from __future__ import annotations

from torch import nn

from medray.errors import PrivacyError
from medray.models.norms import has_batch_norm

__all__ = ["inplace_off", "refuse_unsound"]


def inplace_off(model: nn.Module) -> None:
    """Let no activation overwrite its input, which hooks would read afterwards. What is computed stays."""
    for part in model.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]


def refuse_unsound(model: nn.Module) -> None:
    """Refuse at once what can't be private, whatever the mode.

    Raises:
        PrivacyError: batch normalisation, whose statistics tie samples together and are kept without noise; or nothing
            to train.
    """
    if has_batch_norm(model):
        raise PrivacyError(
            "batch normalisation ties the samples of a batch together and keeps their statistics without noise. "
            "Set model.norm=group: group normalisation takes its place"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise PrivacyError("the network has no parameter to train; choose another model")
