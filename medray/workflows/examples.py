"""Example predictions as pictures, while a network trains: the reference beside the answer, on one validation case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.data.cache import PreparedStore
from medray.data.image import Image
from medray.tracking import Tracker
from medray.train.progress import Progress
from medray.workflows.pictures import beside

EVERY = 3
"""Validations from one picture to the next; the first and the last have one too."""


class Examples:
    """Keeps what a validation found of one case, and draws it where a picture is due.

    Nothing is computed for it: the validation has segmented the case anyway.

    Args:
        store: the prepared cases.
        tracker: takes the pictures.
    """

    def __init__(self, store: PreparedStore, tracker: Tracker) -> None:
        self._store, self._tracker = store, tracker
        self._seen = 0
        self._found: tuple[int, npt.NDArray[Any]] | None = None

    def choose(self, indices: Sequence[int]) -> int | None:
        """The case that shows most foreground; None where there are none."""
        sizes = {
            index: int(np.count_nonzero(mask)) for index in indices if (mask := self._store.mask(index)) is not None
        }
        return max(sizes, key=lambda index: sizes[index], default=None)

    def take(self, index: int, labels: npt.NDArray[Any]) -> None:
        """A validation found ``labels`` (*s) in a case of the store."""
        self._found = (index, labels)

    def draw(self, progress: Progress) -> None:
        """The validation is over; to be called after each."""
        due = self._seen % EVERY == 0 or progress.fraction >= 1.0
        self._seen += 1
        found, self._found = self._found, None
        if not due or found is None:
            return
        index, labels = found
        mask = self._store.mask(index)
        if mask is not None:
            image = Image(array=np.asarray(self._store.image(index)), spacing=None)
            picture = beside(image, np.asarray(mask), labels.astype(np.uint8))
            self._tracker.picture("example", picture, progress.step)
