"""Telling a file from overrides among the words of a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from medray.errors import ConfigError


def split_arguments(words: Sequence[str], named: Callable[[str], Path] | None = None) -> tuple[Path | None, list[str]]:
    """The YAML file, if the first word is one, and the overrides.

    Args:
        words: of the command line.
        named: finds the file that a bare name such as ``seg`` stands for, or raises a ConfigError.

    Raises:
        ConfigError: a later word is no override, or the first is neither.
    """
    path: Path | None = None
    rest = list(words)
    if rest and not _is_override(rest[0]):
        path = Path(rest.pop(0))
        if not path.is_file() and named is not None and path.parent == Path() and not path.suffix:
            path = named(str(path))
        if not path.is_file():
            raise ConfigError(f"{path}: no such file. Name a YAML file first, then overrides such as optim.lr=1e-3")
    for word in rest:
        if not _is_override(word):
            raise ConfigError(f"{word!r} is no override; write KEY=VALUE, such as optim.lr=1e-3, or ~KEY to remove one")
    return path, rest


def _is_override(word: str) -> bool:
    if Path(word).is_file():
        return False
    return "=" in word or word.startswith(("~", "+"))
