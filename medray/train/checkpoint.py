"""Checkpoints that survive a kill at any instant."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from medray.errors import TrainingError

__all__ = ["VERSION", "load", "save"]

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, tuples, dicts) so that ``path`` is always whole: the old or
    the new.

    It is written beside ``path``, flushed to the disk, then renamed over it; the folder's entry is flushed too.

    Raises:
        TrainingError: the disk is full or refuses.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({error}); free space, or choose another folder"
        ) from error
    except RuntimeError as error:
        # torch's zip writer reports a full disk as a RuntimeError of its own.
        if "PytorchStreamWriter" not in str(error):
            raise
        raise TrainingError(
            f"{path}: the checkpoint could not be written ({error}); free space, or choose another folder"
        ) from error


def load(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint to the CPU; None where there is none. Nothing is unpickled but tensors and plain containers.

    Raises:
        TrainingError: a file that isn't a whole checkpoint of this version.
    """
    if not path.exists():
        return None
    fix = "delete it to start anew"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise TrainingError(f"{path}: no readable checkpoint ({cause}); {fix}") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise TrainingError(f"{path}: a checkpoint of version {found}, this medray reads version {VERSION}; {fix}")
    return state
