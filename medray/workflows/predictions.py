"""``validation.npz``: what a classifier said of its validation cases when it was at its best; written while it trains.

An ensemble is chosen from it afterwards, without running any network again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medray.predict.predictor import Floats
from medray.tasks.task import Direction
from medray.train.progress import Progress

NAME = "validation.npz"


class Predictions:
    """Keeps the logits of the best validation in a run's folder.

    Args:
        directory: of the run.
        objective: that says which validation is the best, and its direction.
    """

    def __init__(self, directory: Path, objective: tuple[str, Direction]) -> None:
        self._path, (self._name, direction) = directory / NAME, objective
        self._sign = 1.0 if direction == "max" else -1.0
        self._found: tuple[npt.NDArray[np.int64], Floats] | None = None
        stored = _read(self._path)  # of a run that goes on
        self._best = -math.inf if stored is None else self._sign * stored[2]

    def take(self, indices: Sequence[int], logits: npt.NDArray[np.floating]) -> None:
        """A validation found logits (N, O) for cases of the manifest."""
        self._found = np.asarray(indices, dtype=np.int64), np.asarray(logits, dtype=np.float32)

    def keep(self, progress: Progress) -> None:
        """The validation is over; to be called after each."""
        found, self._found = self._found, None
        value = self._sign * progress.metrics.get(self._name, math.nan)
        if found is None or not value > self._best:
            return
        self._best = value
        partial = self._path.with_name(f"{NAME}.part.npz")
        np.savez(partial, indices=found[0], logits=found[1], value=np.float64(self._sign * value))
        partial.replace(self._path)


def load_predictions(directory: Path, indices: Sequence[int], *, outputs: int) -> Floats | None:
    """Logits (N, O) of some cases from a run's folder; None where they aren't there, or of other cases."""
    stored = _read(directory / NAME)
    if stored is None:
        return None
    found, logits, _ = stored
    place = {int(index): row for row, index in enumerate(found)}
    if logits.shape != (len(found), outputs) or not all(index in place for index in indices):
        return None
    rows = logits[[place[index] for index in indices]]
    return rows if np.isfinite(rows).all() else None


def _read(path: Path) -> tuple[npt.NDArray[np.int64], Floats, float] | None:
    """A damaged file counts as none: it only spares work."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["indices"].astype(np.int64), archive["logits"].astype(np.float32), float(archive["value"])
    except Exception:  # zipfile's, zlib's and NumPy's own errors share no parent
        return None
