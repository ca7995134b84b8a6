"""`medray check DATA`: from a source to a manifest with its findings."""

from __future__ import annotations

from pathlib import Path

from medray.data.checks import check
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.data.sweep import Progress
from medray.errors import DataError


def check_data(
    source: str, path: Path | None = None, *, task: str = "auto", progress: Progress | None = None
) -> Manifest:
    """Find the cases of ``source``, check them, and save the manifest.

    Args:
        source: anything that :func:`medray.data.layouts.build_manifest` understands.
        path: where ``manifest.json`` goes; None saves nothing.
        task: the kind of target, or ``auto``.
        progress: called with (done, all, name).

    Returns:
        The manifest with its findings. A caller that can't go on with errors calls
        :func:`medray.data.checks.require_sound`.

    Raises:
        DataError: no layout fits, or ``path`` can't be written.
    """
    manifest = check(build_manifest(source, task=task, progress=progress), progress=progress)
    if path is not None:
        try:
            manifest.save(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}. Choose a path that can be written") from None
    return manifest
