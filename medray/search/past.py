"""What earlier studies found, and what of it a new one should try right after its default.

A past study is three files of its folder, or an entry of the shipped portfolio: the data's fingerprint, and the
configurations that beat the default there. The nearest data sets by fingerprint speak first. Files are read as if they
came from strangers: bounded, nothing evaluated but literals, and whatever can't be read is no past study.
"""

from __future__ import annotations

import ast
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from medray.data.document import Document
from medray.data.fingerprint import Fingerprint
from medray.errors import DataError
from medray.search.space import Space

PORTFOLIO = Path(__file__).with_name("portfolio.json")
"""Found by ``python -m benchmarks._portfolio``; so far on one phantom."""
FARTHEST = 3.0
"""Distance from which on a data set says nothing: about a factor of 8 in one thing, or of 2 in three."""
NEAREST = 3
"""Data sets that are asked."""
WARM = 3
"""Configurations that are tried first, at most; and never more than a quarter of the trials."""
_KEPT = 5  # of one study
_MOST_FOLDERS = 500
_MOST_BYTES, _MOST_YAML = 2 << 20, 200_000
_MOST_TEXT = 300


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tried(_Frozen):
    """A configuration: paths of Experiment fields to values, and by how much it beat the default there."""

    params: dict[str, Any] = Field(max_length=200)
    gain: float = Field(allow_inf_nan=False)


class Past(_Frozen):
    """One study that has ended.

    Attributes:
        name: where it comes from, as a report shows it.
        objective: the metric, and its direction.
        best: what beat the default, best first.
    """

    name: str = Field(max_length=_MOST_TEXT)
    objective: str = Field(max_length=_MOST_TEXT)
    direction: Literal["max", "min"] = "max"
    fingerprint: Fingerprint
    best: tuple[Tried, ...] = Field(max_length=100)


class Portfolio(_Frozen, Document):
    """``portfolio.json``."""

    made_by: ClassVar[str] = "python -m benchmarks._portfolio"

    version: Literal[1] = 1
    studies: tuple[Past, ...] = Field((), max_length=1000)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A configuration to try.

    Attributes:
        params: of the new space, whole.
        origin: the data set that it comes from.
        distance: of that data set; 0 for the same.
        gain: over the default there.
    """

    params: Mapping[str, Any]
    origin: str
    distance: float
    gain: float


def distance(one: Fingerprint, other: Fingerprint) -> float:
    """How unlike two data sets are: 0 for the same, infinite between tasks or dimensions.

    Each part is a base-2 logarithm of a ratio (of sizes) with its weight; another modality counts 1.
    """
    if one.digest == other.digest:
        return 0.0
    if (one.task, one.ndim, bool(one.columns)) != (other.task, other.ndim, bool(other.columns)):
        return math.inf
    try:
        far = _apart(one, other)
    except (ArithmeticError, ValueError):  # a file of somebody's may hold anything
        return math.inf
    return far if math.isfinite(far) else math.inf


def _apart(one: Fingerprint, other: Fingerprint) -> float:
    parts = [
        0.25 * _ratio(one.cases, other.cases),
        0.5 * _ratio(one.channels, other.channels),
        0.5 * _ratio(len(one.classes), len(other.classes)),
        0.5 * _mean_ratio(one.shape_median, other.shape_median),
        0.25 * _ratio(_rarest(one), _rarest(other)),
        0.0 if one.modality == other.modality else 1.0,
    ]
    if one.spacing_median is not None and other.spacing_median is not None:
        parts.append(0.25 * _mean_ratio(one.spacing_median, other.spacing_median))
    return sum(parts)


def _ratio(one: float, other: float) -> float:
    return abs(math.log2(max(one, 1e-6) / max(other, 1e-6)))


def _mean_ratio(one: Sequence[float], other: Sequence[float]) -> float:
    pairs = list(zip(sorted(one), sorted(other), strict=False))
    return sum(_ratio(a, b) for a, b in pairs) / max(1, len(pairs))


def _rarest(fingerprint: Fingerprint) -> float:
    """Share of the rarest class that occurs."""
    return min((share for share in fingerprint.class_fraction.values() if share > 0), default=1.0)


def propose(
    space: Space,
    default: Mapping[str, Any],
    fingerprint: Fingerprint,
    past: Sequence[Past],
    *,
    objective: str,
    count: int,
) -> list[Proposal]:
    """What to try right after the default: the best of the nearest data sets in turn, then their second best, …

    A value that the new space doesn't hold is left at the default's; what then equals the default, or another
    proposal, is left out.

    Args:
        space: of the new study.
        default: its default's values at the space's paths.
        fingerprint: of its data.
        past: studies that ended.
        objective: of the new study; others speak of other things.
        count: at most so many.
    """
    measured = [(distance(fingerprint, study.fingerprint), study) for study in past if study.objective == objective]
    near = sorted((pair for pair in measured if pair[0] <= FARTHEST and pair[1].best), key=lambda pair: pair[0])
    found: list[Proposal] = []
    seen = [dict(space.active(default))]
    for rank in range(_KEPT):
        for far, study in near[:NEAREST]:
            if rank >= len(study.best) or len(found) >= count:
                continue
            tried = study.best[rank]
            params = _fitted(space, default, tried.params)
            if params is None or params in seen:
                continue
            seen.append(params)
            found.append(Proposal(params=params, origin=study.name, distance=far, gain=tried.gain))
    return found


def _fitted(space: Space, default: Mapping[str, Any], tried: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parts of a configuration that the space holds, filled up with the default; None where that doesn't fit."""
    kept = {
        parameter.path: tried[parameter.path]
        for parameter in space
        if parameter.path in tried and parameter.contains(tried[parameter.path])
    }
    own = {
        parameter.path: default[parameter.path]
        for parameter in space
        if parameter.path in default and parameter.contains(default[parameter.path])
    }
    params = space.active({**own, **kept})
    return params if kept and space.contains(params) else None


# Reading -------------------------------------------------------------------------------------------------------------


def shipped(path: Path = PORTFOLIO) -> list[Past]:
    """The portfolio; empty where it isn't installed or can't be read."""
    try:
        return list(Portfolio.load(path).studies)
    except DataError:
        return []


def studies_in(runs: Path, *, besides: Path | None = None) -> list[Past]:
    """The studies of a folder of runs that ended and found something; the new one itself (``besides``) is left out."""
    found = []
    for folder in _folders(runs):
        if besides is not None and folder.resolve() == besides.resolve():
            continue
        study = read_study(folder)
        if study is not None:
            found.append(study)
    return found


def _folders(runs: Path) -> Iterator[Path]:
    try:
        folders = sorted(folder for folder in runs.iterdir() if not folder.name.startswith(".") and folder.is_dir())
    except OSError:
        return
    yield from folders[:_MOST_FOLDERS]


def read_study(folder: Path) -> Past | None:
    """A past study from its folder; None where it has not ended, found nothing, or can't be read."""
    try:
        asked = yaml.safe_load(_text(folder / "study.yaml", _MOST_YAML))
        rows = list(csv.DictReader(_text(folder / "leaderboard.csv").splitlines()))
        fingerprint = Fingerprint.model_validate(json.loads(_text(folder / "fingerprint.json")))
        objective = next(name for name in rows[0] if name not in ("trial", "state", "seconds", "origin"))
        stored = dict(dict(asked["study"]).get("objectives") or {})
        direction = stored.get(objective, "max")
        best = _best(rows, objective, direction)
        return (
            Past(name=folder.name, objective=objective, direction=direction, fingerprint=fingerprint, best=best)
            if best
            else None
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration, RecursionError):
        return None
    except (yaml.YAMLError, csv.Error):
        return None


def _text(path: Path, most: int = _MOST_BYTES) -> str:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is no file")
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"{path} is too large")
    return raw.decode("utf-8")


def _best(rows: Sequence[Mapping[str, str]], objective: str, direction: str) -> tuple[Tried, ...]:
    """The trials that ran to their end and beat trial 0, best first."""
    sign = 1.0 if direction == "max" else -1.0
    default = next(sign * float(row[objective]) for row in rows if row["trial"] == "0" and row["state"] == "completed")
    found = []
    for row in rows:
        if row["state"] != "completed" or row["trial"] == "0":
            continue
        gain = sign * float(row[objective]) - default
        params = {key: _value(text) for key, text in row.items() if "." in key and key != objective and text}
        if gain > 0 and math.isfinite(gain) and params:
            found.append(Tried(params=params, gain=gain))
    return tuple(sorted(found, key=lambda tried: -tried.gain)[:_KEPT])


def _value(text: str) -> Any:
    """A value as ``str`` wrote it: numbers, True, None and lists come back, all else is text."""
    try:
        return ast.literal_eval(text) if len(text) <= _MOST_TEXT else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
