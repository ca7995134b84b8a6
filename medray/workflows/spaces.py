"""Which of the shipped search spaces suits the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medray.config.compose import compose
from medray.config.spaces import shipped
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.errors import ConfigError
from medray.tasks.catalogue import find_task

__all__ = ["space_for"]


def space_for(overrides: Sequence[str]) -> Path:
    """The shipped space for the data that the overrides name; of images no more than headers are read.

    Args:
        overrides: ``data=DIR`` among them, and ``task.kind=…`` where the data leave it open.

    Raises:
        ConfigError: they name no data.
        DataError: no layout fits the data.
    """
    # The others may speak of entries of the space that is yet to be found.
    about = [text for text in overrides if text.lstrip("+").partition("=")[0].split(".")[0] in ("data", "task")]
    asked = compose(None, about).explicit
    source = asked.get("data")
    if not source:
        raise ConfigError(
            "no data: name a folder, a table, an .npz or a dataset.json, such as data=scans/, or phantom://ct-lesions"
        )
    return shipped(_suiting(build_manifest(source, task=str((asked.get("task") or {}).get("kind", "auto")))))


def _suiting(manifest: Manifest) -> str:
    if manifest.columns:
        return "table"
    if find_task(manifest.task).dense:
        return "seg3d" if manifest.ndim == 3 else "seg"
    return "cls"
