"""A study whose first phase finds a network, on a real Ray: from search to bundle; and a group that searches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from medray.bundle.read import ONNX_NAME, Bundle
from medray.config.genotype import Genotype
from medray.config.schema import NasConfig
from medray.search.nas.loop import load_found
from medray.workflows.architecture import SearchTask, run_search
from medray.workflows.champion import Candidate, score
from medray.workflows.packing import write_champion
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.study import tune
from medray.workflows.training import train_model

SPACE = """
data: phantom://xray-nodules?cases=16&size=28
train: {epochs: 1, batch_size: 8}
study:
  {name: nas, budget: 20min, trials: 2, ensemble: false, nas: {strategy: enas, steps: 2, nodes: 1, feature_size: 4}}
space:
  model.name: {choice: [searched]}
  model.feature_size: {choice: [4]}
"""


def test_what_is_found_is_tried_trained_reported_and_bundled(ray_session: None, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    result = tune(path, [], runs=tmp_path / "runs")
    folder = result.directory
    name = Genotype.load(folder / "nas" / "genotype.json").name
    found = load_found(folder / "nas")
    assert found is not None and found.genotypes[0].name == name and found.steps == 2
    assert "architecture search" in json.loads((folder / "clock.json").read_text())["stages"]
    # On a slow machine no trial would tell anything: what was found is then a finalist without one.
    trained = [*folder.glob("trials/*/experiment.yaml"), *folder.glob("final/*/experiment.yaml")]
    assert name in {yaml.safe_load(path.read_text())["model"]["name"] for path in trained}
    report = result.report.read_text(encoding="utf-8")
    assert "Found by enas in 2 steps" in report and ">normal cell<" in report
    # A bundle of the searched network needs neither the study nor the genotype's file.
    recipe = Recipe(directory=str(folder), explicit={"train": {"epochs": 1}}, cache=str(folder.parent / ".cache"))
    own = train_model(recipe, recipe.experiment({"model.name": name}), tmp_path / "own")
    candidate = Candidate(name="own", members=(own,))
    splits = recipe.splits(own.experiment)
    scores = score(recipe, [candidate], splits.val, metric="auc")["own"]
    write_champion(
        tmp_path / "bundle",
        recipe,
        candidate,
        scores,
        name="own",
        temperature=1.0,
        metrics=scores.intervals(),
        notes=[],
    )
    shutil.rmtree(folder)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.spec.members[0].name == name and (tmp_path / "bundle" / ONNX_NAME).is_file()


def test_a_group_searches_as_one(ray_session: None, tmp_path: Path) -> None:
    prepare_directory("phantom://ct-lesions?cases=8&size=16", tmp_path)
    recipe = Recipe(directory=str(tmp_path), explicit={"train": {"batch_size": 2}}, cache=str(tmp_path / "cache"))
    nas = NasConfig(strategy="darts", steps=3, nodes=1, feature_size=2, batch_size=2)
    found = run_search(
        SearchTask(recipe=recipe, nas=nas, directory=str(tmp_path / "nas"), seconds=300.0, workers=2, cpus=2)
    )
    assert found.steps == 3 and found.genotypes[0].kind == "segmentation"
    assert all(row["train_loss"] > 0 for row in found.history)
