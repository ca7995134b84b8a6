"""``medray runs``: the runs in a folder and what became of them, read from their files alone.

Nothing is opened for writing and nothing is locked: a run that is going on does not notice.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from medray.errors import ConfigError
from medray.workflows.sitting import STATE, State, is_alive

__all__ = ["RunInfo", "list_runs"]

_CHANGING = (
    "result.json", "clock.json", "log.jsonl", "study.db", "study.db-wal", "checkpoint.pt", "weights.safetensors",
)  # fmt: skip
_FRESH = 30.0
"""Seconds within which a run that an older version began, without a state file, has written its clock."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One run.

    Attributes:
        name: of its folder.
        directory: its folder.
        kind: a study, or one training.
        state: ``stopped`` may be resumed; ``failed`` ended by an error; ``damaged``: a file of it can't be read.
        metric: what ``best`` is of; an ended study's is its champion's, on the cases that ``text`` names.
        best: None where nothing has been measured yet.
        spent: seconds, all sittings.
        budget: seconds; None where there is no limit.
        trials: numbers of completed, pruned, failed and running ones; empty for a training.
        changed: epoch seconds of the last change.
        text: what it is doing, the result's headline, or what is wrong.
    """

    name: str
    directory: Path
    kind: Literal["study", "train"]
    state: State
    metric: str | None = None
    best: float | None = None
    spent: float | None = None
    budget: float | None = None
    trials: Mapping[str, int] = field(default_factory=dict)
    changed: float | None = None
    text: str = ""


def list_runs(directory: Path) -> list[RunInfo]:
    """The runs in a folder, the one that changed last first; of a run's own folder, that run.

    Raises:
        ConfigError: there is no such folder.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such folder. Name the folder in which the runs lie; it is runs/ by default")
    if _kind(directory) is not None:
        found = [_describe(directory)]
    else:
        found = [_describe(folder) for folder in _folders(directory) if _kind(folder) is not None]
    return sorted(found, key=lambda run: (-(run.changed or 0.0), run.name))


def _folders(directory: Path) -> Iterator[Path]:
    for folder in sorted(directory.iterdir()):
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.name.startswith("."):
                yield folder


def _kind(folder: Path) -> Literal["study", "train"] | None:
    """What a folder holds; None for no run (one that was only checked or planned has never been run)."""

    def has(*names: str) -> bool:
        with contextlib.suppress(OSError):
            return any((folder / name).exists() for name in names)
        return False

    if has("study.yaml", "study.db", "trials", "clock.json"):
        return "study"
    if has("experiment.yaml", "checkpoint.pt", STATE) and has(STATE, "result.json", "checkpoint.pt", "tensorboard"):
        return "train"
    return None


def _describe(folder: Path) -> RunInfo:
    """One run; whatever is wrong with its files becomes its state."""
    kind = _kind(folder) or "train"
    changed = _changed(folder)
    name = folder.absolute().name
    try:
        return (_study if kind == "study" else _train)(folder, name, changed)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        return RunInfo(name=name, directory=folder, kind=kind, state="damaged", changed=changed, text=said[:200])


def _study(folder: Path, name: str, changed: float | None) -> RunInfo:
    asked = _yaml(folder / "study.yaml")["study"]
    state, stored = _state(folder)
    objectives = dict(asked.get("objectives") or {})
    metric = stored.get("metric") or next((key for key in objectives if key.startswith("val/")), None)
    best, text, trials = stored.get("best"), _said(state, stored), dict(stored.get("trials") or {})
    if state != "running" and "running" in trials:
        trials["running"] = 0  # a process that was killed could not say so
    if not stored:
        best, metric, trials = _from_trials(folder, metric, objectives.get(metric or "", "max"))
    spent = _json(folder / "clock.json").get("spent") if (folder / "clock.json").exists() else stored.get("elapsed")
    if (folder / "result.json").exists():
        result = _json(folder / "result.json")
        metric, text, spent = result["metric"], str(result["headline"]), result.get("seconds", spent)
        best = (result["metrics"].get(metric) or [None])[0]
    return RunInfo(
        name=name,
        directory=folder,
        kind="study",
        state=state,
        metric=metric,
        best=_number(best),
        spent=_number(spent),
        budget=_number(asked.get("budget")),
        trials=trials,
        changed=changed,
        text=text,
    )


def _train(folder: Path, name: str, changed: float | None) -> RunInfo:
    state, stored = _state(folder)
    best, metric, spent, budget = stored.get("best"), stored.get("metric"), stored.get("elapsed"), None
    text = _said(state, stored)
    if (folder / "experiment.yaml").exists():  # one that is still reading its data has none yet
        budget = (_yaml(folder / "experiment.yaml").get("train") or {}).get("budget")
    elif not stored:
        raise ValueError("experiment.yaml is missing")
    if (folder / "result.json").exists():
        result = _json(folder / "result.json")
        metric = metric or next(iter(result["best"]), None)
        best, spent = result["best"].get(metric), result["seconds"]
        text = f"{result['stopped']} after epoch {result['epochs']}"
    return RunInfo(
        name=name,
        directory=folder,
        kind="train",
        state=state,
        metric=metric,
        best=_number(best),
        spent=_number(spent),
        budget=_number(budget),
        changed=changed,
        text=text,
    )


def _state(folder: Path) -> tuple[State, dict[str, Any]]:
    """What a run does, and its state file's content (empty where an older version has written none)."""
    path = folder / STATE
    if not path.exists():
        if (folder / "result.json").exists():
            return "ended", {}
        clock = folder / "clock.json"
        fresh = clock.exists() and time.time() - clock.stat().st_mtime < _FRESH
        return ("running" if fresh else "stopped"), {}
    stored = _json(path)
    state = stored["state"]
    if state not in ("running", "ended", "stopped", "failed"):
        raise ValueError(f"{STATE}: state is {state!r}")
    if state == "running" and not is_alive(stored, time.time() - path.stat().st_mtime):
        # Killed after its last file was written, or before.
        state = "ended" if (folder / "result.json").exists() else "stopped"
    return state, stored


def _said(state: State, stored: Mapping[str, Any]) -> str:
    if state == "failed":
        return " ".join(str(stored.get("error") or "").split())[:200]
    return str(stored.get("stage") or "") if state in ("running", "stopped") else ""


def _from_trials(folder: Path, metric: str | None, direction: str) -> tuple[float | None, str | None, dict[str, int]]:
    """The best of a study without a state file, from its trials' results."""
    values, ended = [], {"completed": 0, "pruned": 0}
    for path in sorted((folder / "trials").glob("*/result.json")):
        result = _json(path)
        ended["pruned" if result["stopped"] in ("pruned", "deadline") else "completed"] += 1
        metric = metric or next(iter(result["best"]), None)
        value = _number(result["best"].get(metric))
        if value is not None:
            values.append(value)
    best = (min if direction == "min" else max)(values) if values else None
    return best, metric, ended


def _changed(folder: Path) -> float | None:
    times = []
    for name in (*_CHANGING, "study.yaml", "experiment.yaml"):
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    if not times:
        with contextlib.suppress(OSError):
            times.append(folder.stat().st_mtime)
    return max(times, default=None)


def _json(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path.name} holds no object")
    return stored


def _yaml(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} is no YAML: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return stored


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
