"""Overrides as a user types them on the command line.

    optim.lr=1e-3   +a.b=…   ++a.b=…   ~a.b        a field; with a sparse tree, = and + do the same
    augment=heavy   ~augment                       a config group
    study.objectives.val/dice=max                  a key with a slash
    space.optim.lr.float=[1e-4,1e-3]  ~space.optim.lr   an entry of the search space, whose key has dots itself
    data=/scans/Ärzte (2024), ~neu                 free text: taken as typed, before any grammar sees it

Values are read by Hydra's own override grammar, save those of text fields: its lexer refuses ``~``, commas, parentheses
and every letter beyond ASCII.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medray.config.paths import check_path, is_text, known
from medray.errors import ConfigError

SOURCE = "command line"

SPACE_OPERATORS = ("choice", "float", "int", "log", "step", "when")
KINDS = ("choice", "float", "int")


@dataclass(frozen=True, kw_only=True)
class Override:
    """One parsed override.

    Attributes:
        action: set a value, remove a path, or choose a config group's option.
        path: where; for ``space`` it is ("space", "optim.lr", "float").
        value: what; for a removal, the value that has to stand there, or None for any.
        text: as the user typed it.
    """

    action: Literal["set", "remove", "group"]
    path: tuple[str, ...]
    value: Any
    text: str


def parse_override(text: str, groups: Collection[str]) -> Override:
    """Parse one override.

    Args:
        text: as typed, such as ``optim.lr=1e-3``.
        groups: names of the config groups at hand.

    Raises:
        ConfigError: it is no override, or names a path that the schema does not have.
    """
    remove = text.startswith("~")
    key, equals, raw = (text[1:] if remove else text.removeprefix("++").removeprefix("+")).partition("=")
    key = key.strip()
    if not key or (not equals and not remove):
        raise ConfigError(
            f"{SOURCE}: {text!r} is no override; write KEY=VALUE, such as optim.lr=1e-3, or ~KEY to remove one"
        )
    if key in groups and (remove or (raw and not raw.lstrip().startswith("{"))):
        return Override(action="remove" if remove else "group", path=(key,), value=raw.strip() or None, text=text)
    path = split_key(key)
    if path[0] == "space":
        if len(path) > 1:
            check_space_key(path[1], SOURCE)
    elif check_path(path, SOURCE) == "section" and not remove and not raw.lstrip().startswith("{"):
        raise ConfigError(
            f"{SOURCE}: {text!r}: '{key}' is a section; set one of its fields, such as {key}.{_first(path)}=…"
        )
    if remove:
        return Override(action="remove", path=path, value=parse_value(path, raw, text) if equals else None, text=text)
    return Override(action="set", path=path, value=parse_value(path, raw, text), text=text)


def split_key(key: str) -> tuple[str, ...]:
    """Split a key at its dots, save where the dots are part of a name (objectives, entries of the space)."""
    if key.startswith("study.objectives."):
        return ("study", "objectives", key.removeprefix("study.objectives."))
    parts = tuple(key.split("."))
    if parts[0] != "space" or len(parts) == 1:
        return parts
    for position, part in enumerate(parts[1:], start=1):
        if part in SPACE_OPERATORS and position > 1:
            rest = (".".join(parts[position + 1 :]),) if parts[position + 1 :] else ()
            return ("space", ".".join(parts[1:position]), part, *rest)
    return ("space", ".".join(parts[1:]))


def check_space_key(key: str, source: str) -> None:
    """Refuse an entry of the space that is no field of the Experiment.

    Raises:
        ConfigError: names the nearest fields.
    """
    path = tuple(key.split("."))
    if path[0] == "study":
        raise ConfigError(f"{source}: space.{key}: a search varies the Experiment, and 'study' is how it is run")
    if check_path(path, f"{source}: space") != "field":
        raise ConfigError(
            f"{source}: space.{key}: '{key}' is a section; a search varies fields, such as {key}.{_first(path)}"
        )


def parse_value(path: tuple[str, ...], raw: str, text: str) -> Any:
    """Read a value: free text as typed, anything else by Hydra's grammar."""
    if is_text(path):
        return _text(path, raw)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"x={raw}")
        if parsed.is_sweep_override():
            raise ConfigError(f"{SOURCE}: {text!r}: one value is wanted; write a list as [{raw}]")
        return _plain(parsed.value())
    except HydraException as error:
        reason = str(error).splitlines()[0].partition(" expecting ")[0]
        raise ConfigError(
            f"{SOURCE}: {text!r}: the value can't be read ({reason}); write a list as [a,b], and text with special "
            "characters in quotes"
        ) from None


def _text(path: tuple[str, ...], raw: str) -> str | None:
    if raw == "null" and path != ("data",):
        return None
    if len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "'\"":
        return raw[1:-1]  # quotes that the shell left
    return raw


def expand_home(reference: str) -> str:
    """``~/scans`` to the home folder's: no shell expands a ~ behind a =, or in a file."""
    return str(Path(reference).expanduser()) if reference == "~" or reference.startswith("~/") else reference


def _plain(value: Any) -> Any:
    """Hydra's parsed elements (quoted strings among them) as plain Python values."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _first(path: tuple[str, ...]) -> str:
    return next(parts[-1] for parts in known() if parts[:-1] == path)
