"""The search spaces that come with medray; ``search_spaces/`` of the repository is this folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from medray.config.paths import did_you_mean
from medray.errors import ConfigError

__all__ = ["names", "shipped"]

_FOLDER = Path(__file__).parent / "spaces"


def names() -> list[str]:
    """Names by which :func:`shipped` knows them."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shipped(name: str) -> Path:
    """The file of a space that comes with medray, such as ``seg``.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=2)
        raise ConfigError(
            f"{name!r} is no file, and no search space that comes with medray. "
            + (did_you_mean(near) if near else f"Those are: {', '.join(names())}")
        )
    return _FOLDER / f"{name}.yaml"
