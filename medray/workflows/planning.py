"""From data to an ``experiment.yaml`` that a person can read and edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from medray.config.schema import Experiment, SplitConfig
from medray.data.checks import check, require_sound
from medray.data.fingerprint import Fingerprint, measure
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.data.splits import make_splits
from medray.plan.machine import Machine
from medray.workflows.recipe import Recipe

Progress = Callable[[int, int, str], None]


def prepare_directory(
    source: str,
    directory: Path,
    *,
    task: str = "auto",
    split: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, Fingerprint]:
    """Check the data and measure them; ``manifest.json`` and ``fingerprint.json`` are written to ``directory``.

    Raises:
        DataError: nothing usable, or errors among the findings.
        LeakError: a patient on two sides of a split.
    """
    manifest = check(build_manifest(source, task=task), progress=progress)
    manifest.save(directory / "manifest.json")
    require_sound(manifest, strict=False)
    # Test cases that are drawn rather than given must not shape the plan either.
    config = SplitConfig.model_validate(dict(split or {}))
    held_back = set(make_splits(manifest, config, config.seed).test)
    cases = tuple(case for index, case in enumerate(manifest.cases) if index not in held_back)
    fingerprint = measure(manifest.model_copy(update={"cases": cases}), progress=progress)
    fingerprint.save(directory / "fingerprint.json")
    return manifest, fingerprint


def plan_data(source: str, out: Path, *, task: str = "auto", budget: float | None = None) -> Path:
    """``medray plan DATA``: write manifest, fingerprint and ``experiment.yaml`` to the folder ``out``.

    Returns:
        The path of ``experiment.yaml``.
    """
    prepare_directory(source, out, task=task)
    recipe = Recipe(directory=str(out), explicit={"data": source}, cache=str(default_cache()))
    path = out / "experiment.yaml"
    path.write_text(describe(recipe.experiment(budget=budget), recipe.fingerprint, recipe.machine), encoding="utf-8")
    return path


def describe(experiment: Experiment, fingerprint: Fingerprint, machine: Machine) -> str:
    """The experiment as commented YAML: what it was made from on top, every field below."""
    shape = " x ".join(str(n) for n in fingerprint.shape_median)
    spacing = fingerprint.spacing_median
    head = [
        f"# Made by `medray plan` for {fingerprint.cases} training cases of {fingerprint.patients} patients.",
        f"# {fingerprint.task}, {fingerprint.ndim}-D, {fingerprint.modality}; median shape {shape}"
        + (f", spacing {' x '.join(f'{s:.3g}' for s in spacing)} mm." if spacing else "."),
        f"# Classes: {', '.join(fingerprint.classes)}.",
        f"# Machine: {machine.note}.",
        "# Edit any field, then: medray train experiment.yaml",
        "",
    ]
    return "\n".join(head) + dump(experiment)


def dump(experiment: Experiment) -> str:
    """All fields as YAML that :func:`medray.config.compose.compose` reads back to the same Experiment."""
    return yaml.safe_dump(json.loads(experiment.model_dump_json()), sort_keys=False, allow_unicode=True, width=120)


def default_cache() -> Path:
    """Where prepared cases lie unless told otherwise: deleting ``runs/`` leaves nothing behind."""
    return Path("runs") / ".cache"


def experiment_id(experiment: Experiment) -> str:
    """A short content hash of an experiment."""
    return hashlib.sha256(experiment.model_dump_json().encode()).hexdigest()[:12]
