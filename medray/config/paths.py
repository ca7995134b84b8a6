"""Paths into the schema: which exist, what they allow, and which is nearest to a wrong one."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from medray.config.schema import Experiment, StudyConfig
from medray.errors import ConfigError

Kind = Literal["section", "field", "mapping"]
"""section: holds fields. field: holds a value. mapping: holds keys that the user chooses (``study.objectives``)."""


def _walk(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Kind, dict[str, Any]]]:
    document = model.model_json_schema()
    for name, info in model.model_fields.items():
        path = (*prefix, name)
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield path, "section", {}
            yield from _walk(annotation, path)
        else:
            rule = document["properties"][name]
            yield path, ("mapping" if rule.get("type") == "object" else "field"), rule


@functools.cache
def known() -> dict[tuple[str, ...], tuple[Kind, dict[str, Any]]]:
    """Every path of the Experiment and, under ``study``, of the StudyConfig, with its JSON-schema rule."""
    table: dict[tuple[str, ...], tuple[Kind, dict[str, Any]]] = {("study",): ("section", {})}
    for path, kind, rule in (*_walk(Experiment, ()), *_walk(StudyConfig, ("study",))):
        table[path] = (kind, rule)
    return table


def is_text(path: tuple[str, ...]) -> bool:
    """Whether the field holds free text, so that no grammar may interpret what the user typed."""
    kind, rule = known().get(path, ("section", {}))
    options = [option for option in rule.get("anyOf", [rule]) if option.get("type") != "null"]
    return kind == "field" and all(option.get("type") == "string" and "enum" not in option for option in options)


def check_path(path: tuple[str, ...], source: str) -> Kind:
    """The kind of a path.

    Raises:
        ConfigError: the schema has no such path; names the nearest ones.
    """
    table = known()
    for length in range(1, len(path) + 1):
        entry = table.get(path[:length])
        if entry is None:
            break
        if entry[0] == "mapping":
            return "field" if len(path) > length else "mapping"
        if length == len(path):
            return entry[0]
        if entry[0] == "field":
            raise ConfigError(
                f"{source}: there is no '{'.'.join(path)}': '{'.'.join(path[:length])}' holds a value, not further keys"
            )
    hints = nearest(path)
    raise ConfigError(f"{source}: there is no '{'.'.join(path)}'." + (f" {did_you_mean(hints)}" if hints else ""))


def nearest(path: tuple[str, ...], *, count: int = 3) -> list[str]:
    """Paths of the schema that a wrong one may have meant, best first."""
    wrong = ".".join(path)
    everything = [".".join(parts) for parts, (kind, _) in known().items() if kind != "section" or len(path) == 1]
    same_leaf = [name for name in everything if name.split(".")[-1] == path[-1]]
    siblings = {name.split(".")[-1]: name for name in everything if tuple(name.split(".")[:-1]) == path[:-1]}
    close = [siblings[leaf] for leaf in difflib.get_close_matches(path[-1], siblings, n=count, cutoff=0.5)]
    close += difflib.get_close_matches(wrong, everything, n=count, cutoff=0.6)
    if not (close or same_leaf):
        leaves: dict[str, list[str]] = {}
        for name in everything:
            leaves.setdefault(name.split(".")[-1], []).append(name)
        for leaf in difflib.get_close_matches(path[-1], leaves, n=count, cutoff=0.6):
            close += leaves[leaf]
    if not (close or same_leaf):
        close = list(siblings.values())
        count = 12
    return list(dict.fromkeys([*same_leaf, *close]))[:count]


def did_you_mean(hints: Sequence[str]) -> str:
    """A sentence that names the candidates."""
    return f"Did you mean {' or '.join([', '.join(hints[:-1]), hints[-1]] if len(hints) > 1 else hints)}?"


def allowed(path: tuple[str, ...]) -> str:
    """What a field takes, in words: ``a number > 0, <= 10``; empty where nothing is known."""
    while path and path not in known():
        path = path[:-1]
    if not path:
        return ""
    _, rule = known()[path]
    if path[-1] == "budget":  # the validator in front of it takes text too, which the JSON schema can't show
        return f"seconds > 0, or 90s, 20min, 1.5h ({rule['description']})"
    text = " or ".join(dict.fromkeys(filter(None, (_say(option) for option in rule.get("anyOf", [rule])))))
    description = rule.get("description")
    return f"{text} ({description})" if text and description else text


def _say(rule: dict[str, Any]) -> str:
    if "enum" in rule:
        return " | ".join(map(str, rule["enum"]))
    if "const" in rule:
        return str(rule["const"])
    limits = [
        f"{sign} {rule[key]:.12g}"
        for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
        if key in rule
    ]
    name = {"number": "a number", "integer": "a whole number", "boolean": "true | false", "null": "null"}.get(
        rule.get("type", ""), ""
    )
    if rule.get("type") == "string":
        name = f"text like {rule['pattern']}" if "pattern" in rule else "text"
    if rule.get("type") == "array":
        items: dict[str, Any] = rule.get("items") or next(iter(rule.get("prefixItems", [])), {})
        count = (
            f"{rule['maxItems']} values"
            if rule.get("minItems") == rule.get("maxItems") and "maxItems" in rule
            else "values"
        )
        inner = _say(items)
        name = f"a list of {count}" + (f", each {inner}" if inner else "")
    if rule.get("type") == "object":
        inner = _say(rule.get("additionalProperties") or {})
        name = "a mapping" + (f" to {inner}" if inner else "")
    return " ".join(filter(None, (name, ", ".join(limits))))
