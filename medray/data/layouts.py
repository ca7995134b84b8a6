"""From a source as a person writes it to a Manifest."""

from __future__ import annotations

from collections.abc import Callable

from medray.data.manifest import Manifest
from medray.data.phantoms import phantom_manifest
from medray.errors import DataError

Progress = Callable[[int, int, str], None]


def build_manifest(source: str, *, task: str = "auto", progress: Progress | None = None) -> Manifest:
    """Find the cases of ``source``."""
    if source.startswith("phantom://"):
        return phantom_manifest(source)
    raise DataError(f"{source}: no layout fits")
