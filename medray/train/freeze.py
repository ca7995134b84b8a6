"""An encoder that stays as it is for the first epochs, while what was added to it finds its feet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

__all__ = ["Freeze"]


class Freeze:
    """Holds parts of a model still: no gradient, no decay, no dropout, running statistics left alone.

    Args:
        parts: the modules that are in evaluation mode while they are held.
        parameters: that are held.
        epochs: for how many.
        skip: leave them out of the backward pass as well, which saves its time and memory. Where several processes
            train, each awaits the gradients of all parameters: there they are computed and dropped.
    """

    def __init__(
        self, parts: Sequence[nn.Module], parameters: Iterable[nn.Parameter], epochs: int, *, skip: bool
    ) -> None:
        self._parts, self._epochs, self._skip = parts, epochs, skip
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._held = False

    def set(self, epoch: int) -> list[nn.Parameter]:
        """Before a step of ``epoch`` (from 0): the parameters whose gradients don't count in it."""
        held = epoch < self._epochs
        if held or self._held:
            # Again in each step, since a validation puts the whole model back into training mode.
            self._hold(held)
        return self._parameters if held else []

    def release(self) -> None:
        """All parts train again, whatever the epoch."""
        if self._held:
            self._hold(False)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within it all parts train, for what is measured once for the whole run."""
        held = self._held
        if held:
            self._hold(False)
        try:
            yield
        finally:
            if held:
                self._hold(True)

    def _hold(self, held: bool) -> None:
        for part in self._parts:
            part.train(not held)
        if self._skip and held != self._held:
            for parameter in self._parameters:
                parameter.requires_grad_(not held)
        self._held = held
