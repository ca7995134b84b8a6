"""train_model(): what a run writes down of what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

from medray.config.compose import build_experiment, compose
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.training import train_model


def test_the_micro_batch_that_was_found_is_written_down_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_directory("phantom://xray-nodules?cases=24&size=32", tmp_path)
    explicit = {
        "device": "cpu",
        "model": {"name": "small_cnn", "feature_size": 4, "depth": 2},
        "loss": {"name": "heteroscedastic"},
        "train": {"batch_size": "auto", "epochs": 1, "precision": "fp32"},
    }
    recipe = Recipe(directory=str(tmp_path), explicit=explicit, cache=str(tmp_path / "cache"))
    experiment = recipe.experiment()
    planned = Recipe(directory=recipe.directory, explicit={}, cache=recipe.cache).experiment().train.batch_size
    assert (experiment.train.batch_size, experiment.train.micro_batch) == (planned, "auto") and planned > 1

    monkeypatch.setattr("medray.train.fit.largest_micro_batch", lambda *_, **__: 1)
    run = tmp_path / "run"
    trained = train_model(recipe, experiment, run)
    written = build_experiment(compose(run / "experiment.yaml").explicit)
    assert trained.fit.micro_batch == written.train.micro_batch == 1 and written == trained.experiment
    monkeypatch.setattr("medray.train.fit.largest_micro_batch", lambda *_, **__: pytest.fail("measured again"))
    again = train_model(recipe, experiment, run)  # as it was asked for the first time: the ended run is read
    assert again.fit.best == trained.fit.best and again.experiment == trained.experiment
