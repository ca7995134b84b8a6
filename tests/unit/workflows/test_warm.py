"""Past studies that have seen what a new one holds back are not asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from medray.config.schema import SplitConfig
from medray.data.fingerprint import Fingerprint
from medray.data.layouts import build_manifest
from medray.data.splits import make_splits
from medray.search.past import distance
from medray.workflows.warm import unspoilt


def past(runs: Path, name: str, source: str, split: dict[str, Any]) -> Any:
    folder = runs / name
    folder.mkdir()
    build_manifest(source).save(folder / "manifest.json")
    (folder / "study.yaml").write_text(yaml.safe_dump({"explicit": {"split": split}}), encoding="utf-8")
    return SimpleNamespace(name=name)


def test_only_studies_that_held_back_the_same_cases_are_asked(tmp_path: Path) -> None:
    source = "phantom://xray-nodules?cases=20&size=16"
    manifest, config = build_manifest(source), SplitConfig(seed=3)
    test = make_splits(manifest, config, config.seed).test
    assert test
    same = past(tmp_path, "same", source, {"seed": 3})
    other_split = past(tmp_path, "other-split", source, {"seed": 4})
    other_data = past(tmp_path, "other-data", "phantom://xray-nodules?cases=20&size=16&seed=9", {})
    damaged = past(tmp_path, "damaged", source, {"seed": 3})
    (tmp_path / "damaged" / "manifest.json").write_text("{", encoding="utf-8")
    every = [same, other_split, other_data, damaged]
    assert unspoilt(every, tmp_path, manifest, test) == [same, other_data]
    assert unspoilt(every, tmp_path, manifest, ()) == every  # nothing is held back


@pytest.mark.parametrize("change", [{"spacing_median": (float("inf"), 1.0)}, {"cases": 10**400}])
def test_a_fingerprint_that_makes_no_sense_is_far_away(change: dict[str, Any]) -> None:
    whole = Fingerprint.model_construct(
        digest="a", task="classification", ndim=2, columns=(), cases=10, channels=1, classes=("a", "b"),
        shape_median=(16, 16), class_fraction={}, modality="other", spacing_median=(1.0, 1.0),
    )  # fmt: skip
    odd = whole.model_copy(update={"digest": "b", **change})
    assert distance(whole, odd) == float("inf")
