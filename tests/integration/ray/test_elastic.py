"""A group that may be smaller: it goes on when a machine is lost, and grows when one comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.training import train_model
from tests.integration.ray.test_train_together import PLAIN

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(600)
def test_a_group_goes_on_without_a_lost_machine_and_grows_with_a_new_one(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    prepare_directory("phantom://xray-nodules?cases=40&size=32", data)
    explicit = PLAIN | {"train": {**PLAIN["train"], "epochs": 400}}
    setup = {"directory": str(data), "explicit": explicit, "cache": str(cache)}
    (tmp_path / "setup.json").write_text(json.dumps(setup), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.ray.elastic_process", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "warning: 1 of 2 processes train" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [size for size, _ in groupby(size for _, size in found["epochs"])] == [2, 1, 2]
    steps = [after - before for (before, _), (after, _) in pairwise(found["epochs"])]
    assert set(steps) <= {0, 1} and steps.count(0) <= 2, "each change costs less than the time between two checkpoints"

    # What one process makes of it: the same, but for fp32's rounding, which grows tenfold an epoch. Its fifth and
    # sixth are those of the one process that was left; with half the batch they would be others.
    rows, last = found["history"], found["epochs"][-1][0]
    recipe = Recipe(directory=str(data), explicit=explicit, cache=str(cache))
    alone = train_model(recipe, recipe.experiment(), tmp_path / "alone", on_validation=lambda at: at.epoch >= last)
    assert [(row["epoch"], row["step"]) for row in rows] == [(row["epoch"], row["step"]) for row in alone.fit.history]
    for mine, theirs in zip(rows[:6], alone.fit.history, strict=False):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.01)
