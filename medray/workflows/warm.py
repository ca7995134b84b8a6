"""Which past studies a new one may learn from: none that trained or chose on what the new one holds back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from medray.config.schema import SplitConfig
from medray.data.manifest import Manifest
from medray.data.splits import make_splits
from medray.errors import MedrayError
from medray.search.past import Past, studies_in
from medray.workflows.recipe import Recipe

__all__ = ["past_of", "unspoilt"]

_MOST_BYTES = 2**24


def past_of(directory: Path, recipe: Recipe) -> list[Past]:
    """The studies beside a new one that it may learn from."""
    found = studies_in(directory.parent, besides=directory)
    return unspoilt(found, directory.parent, recipe.manifest, recipe.splits(recipe.experiment()).test)


def unspoilt(past: Iterable[Past], runs: Path, manifest: Manifest, test: Iterable[int]) -> list[Past]:
    """Those of the past studies that have seen none of the test cases: else these would have been used for a choice.

    Args:
        past: studies of the folder ``runs``, by their folders' names.
        runs: where they lie.
        manifest: of the new study.
        test: indices of its test cases.
    """
    held_back = {reference for index in test for reference in _references(manifest, index)}
    return [study for study in past if not held_back or not _has_seen(runs / study.name, held_back)]


def _has_seen(folder: Path, held_back: set[str]) -> bool:
    """Also where it can't be told: a study without its manifest is not worth a doubt."""
    try:
        if (folder / "study.yaml").stat().st_size > _MOST_BYTES:
            return True
        asked = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
        config = SplitConfig.model_validate(dict(dict(asked["explicit"]).get("split") or {}))
        manifest = Manifest.load(folder / "manifest.json")
        splits = make_splits(manifest, config, config.seed)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, MedrayError):
        return True
    used = (*splits.train, *splits.val)
    return any(reference in held_back for index in used for reference in _references(manifest, index))


def _references(manifest: Manifest, index: int) -> list[str]:
    images = manifest.cases[index].images
    return [image if "://" in image else str(Path(manifest.root) / image) for image in images]
