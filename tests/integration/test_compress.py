"""The whole way on phantoms with a small network: steps chain, are gated, and are told in the new bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medray.bundle.read import Bundle
from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.compress.sparsify import zero_share
from medray.errors import BundleError, CompressionError
from medray.workflows import compress as workflow
from medray.workflows.compress import CompressOptions, compress
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.training import new_model, open_store

SOURCE = "phantom://xray-nodules?cases=24&size=32"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A bundle of a small classifier that saw nothing yet; its experiment trains for one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "data": SOURCE,
        "model": {"name": "small_cnn", "feature_size": 16},
        "preprocess": {"size": [32, 32]},
        "train": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
        "split": {"test": 0.2, "folds": 2},
    }
    prepare_directory(SOURCE, folder, split=tree["split"])
    recipe = Recipe(directory=str(folder), explicit=tree, cache=str(folder / "cache"))
    experiment, manifest = recipe.experiment(), recipe.manifest
    store = open_store(recipe, experiment)
    golden = np.stack([np.asarray(store.image(index)) for index in range(4)])
    bundle = write_bundle(
        folder / "bundle",
        kind=manifest.task,
        ndim=2,
        channels=manifest.channels,
        classes=manifest.classes,
        preprocess=experiment.preprocess,
        inference=InferenceSpec(),
        models=[new_model(experiment, manifest)],
        configs=[experiment.model],
        golden=golden,
        experiment=experiment,
        fingerprint=recipe.fingerprint,
    )
    return bundle.directory


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDRAY_CACHE", str(tmp_path / "machine"))
    monkeypatch.chdir(tmp_path)


def timed(monkeypatch, *speedups):
    """Each step's race ends with so many times the speed: on tiny networks the clock says little."""
    left = list(speedups)
    monkeypatch.setattr(
        workflow, "race", lambda engines, inputs: dict(zip(engines, ([1.0], [1.0 / left.pop(0)]), strict=True))
    )


def test_steps_chain_and_the_new_bundle_tells_of_them(trained, tmp_path, monkeypatch):
    timed(monkeypatch, 2.0, 3.0)
    options = CompressOptions(prune=0.5, quantize="int8", max_drop=1.0, calibration=4, threads=1, runtime="onnx")
    report = compress(trained, options, out=tmp_path / "small")
    assert [(step.name, step.kept) for step in report.steps] == [("prune 0.5", True), ("quantize int8", True)]
    assert report.exit_code == 0 and report.validation_cases > 1
    prune, int8 = report.steps
    assert prune.facts["macs_after"] < 0.4 * prune.facts["macs_before"]
    assert int8.facts["calibration_cases"] == 4
    assert int8.verdict.onnx_mb[1] < 0.5 * int8.verdict.onnx_mb[0] < 0.5 * prune.verdict.onnx_mb[0]

    small = Bundle.open(tmp_path / "small")
    assert small.spec.precision == "int8" and small.spec.pruned and len(small.spec.history) == 3
    assert {"onnx", "openvino"} <= set(small.runtimes) and "torch" not in small.runtimes
    assert small.predictor("onnx", threads=1).precision == "int8"
    with pytest.raises(BundleError, match="kept to explain"):
        small.predictor("torch")
    twin = small.model()
    assert sum(p.numel() for p in twin.parameters()) == prune.facts["parameters_after"]
    inputs, golden = small.golden()
    with torch.no_grad():
        assert np.abs(twin(torch.from_numpy(inputs)).numpy() - golden).max() < 0.5, "the twin is the same network"
    assert "prune 0.5" in (tmp_path / "small/card.md").read_text()
    assert len(json.loads((tmp_path / "small-work/report.json").read_text())["steps"]) == 2
    with pytest.raises(CompressionError, match="int8 already"):
        compress(tmp_path / "small", options, out=tmp_path / "smaller")


def test_a_step_that_is_slower_is_undone_and_the_next_builds_on_what_was(trained, tmp_path, monkeypatch):
    timed(monkeypatch, 0.9, 1.5)
    options = CompressOptions(
        distill="small_cnn", quantize="int8", max_drop=1.0, calibration=4, threads=1, runtime="onnx"
    )
    report = compress(trained, options, ["train.epochs=1"], out=tmp_path / "small")
    first, second = report.steps
    assert not first.kept and "slower" in first.reason and second.kept
    assert Bundle.open(tmp_path / "small").spec.members == Bundle.open(trained).spec.members
    assert "undone" in (tmp_path / "small/card.md").read_text()


def test_quantisation_aware_training_is_judged_beside_quantisation_after_training(trained, tmp_path, monkeypatch):
    timed(monkeypatch, 2.0, 2.0)
    options = CompressOptions(quantize="int8", qat=True, max_drop=1.0, calibration=4, threads=1, runtime="onnx")
    report = compress(trained, options, ["train.epochs=2"], out=tmp_path / "small")
    after, qat = report.steps
    assert [after.name, qat.name] == ["quantize int8", "quantize int8 qat"]
    assert after.kept != qat.kept, "one of the two"
    loser, winner = sorted(report.steps, key=lambda step: step.kept)
    assert f"{winner.name} loses no more" in loser.reason
    worst = [max(drop.value for drop in step.verdict.drops.values()) for step in (winner, loser)]
    assert worst[0] < worst[1] or (worst[0] == worst[1] and after.kept)
    assert after.verdict.metrics["auc"][0] == qat.verdict.metrics["auc"][0], "both against what they are made from"
    assert qat.facts["seconds"] > 0 and qat.facts["calibration_cases"] == 4
    assert qat.compared.startswith("against quantize int8: auc ") and not after.compared
    small = Bundle.open(tmp_path / "small")
    assert small.spec.precision == "int8" and "quantize int8 qat" in (tmp_path / "small/card.md").read_text()
    work = tmp_path / "small-work"
    rehearsed, source = Bundle.open(work / "quantize-int8-qat/bundle"), Bundle.open(trained)
    before, weights = source.model().state_dict(), rehearsed.model().state_dict()
    assert before.keys() == weights.keys()
    name = next(key for key in before if key.endswith("weight") and before[key].ndim == 4)
    assert not torch.equal(before[name], weights[name]), "it was trained"
    statistics = [key for key in before if key.endswith("running_mean")]
    assert statistics and all(torch.equal(before[key], weights[key]) for key in statistics)


def test_zeros_survive_being_quantised_and_pack(trained, tmp_path, monkeypatch):
    timed(monkeypatch, 1.0, 2.0, 2.0)
    options = CompressOptions(
        sparsity=0.8, quantize="int8", qat=True, max_drop=1.0, calibration=4, threads=1, runtime="onnx"
    )
    report = compress(trained, options, ["train.epochs=1"], out=tmp_path / "small")
    sparse = report.steps[0]
    assert sparse.name == "sparsity 0.8" and sparse.kept, "as fast as before, and smaller once packed"
    assert sparse.facts["zeros_before"] == 0 and abs(sparse.facts["zeros_after"] - 0.8) < 0.01
    before, after = sparse.verdict.packed_mb
    assert after < 0.5 * before and sparse.verdict.onnx_mb[1] == pytest.approx(sparse.verdict.onnx_mb[0], rel=0.1)
    for name in ("sparsity-0.8", "quantize-int8", "quantize-int8-qat"):
        twin = Bundle.open(tmp_path / "small-work" / name / "bundle").model()
        assert abs(zero_share(twin) - 0.8) < 0.01
    with pytest.raises(CompressionError, match="int8 already"):
        compress(tmp_path / "small", options, out=tmp_path / "smaller")
    place = tmp_path / "small-work/sparsity-0.8/bundle"
    (step,) = compress(place, CompressOptions(prune=0.5, threads=1), out=tmp_path / "cut").steps
    assert not step.kept and "fine-tuning would fill them" in step.reason


def test_a_sparsity_that_shrinks_neither_file_nor_time_is_undone(trained, tmp_path, monkeypatch):
    timed(monkeypatch, 1.0)
    options = CompressOptions(sparsity=0.02, max_drop=1.0, threads=1, runtime="onnx")
    (step,) = compress(trained, options, ["train.epochs=1"], out=tmp_path / "small").steps
    assert not step.kept and "neither latency nor size shrank" in step.reason and step.verdict is not None
    assert not (tmp_path / "small").exists()


def test_where_nothing_is_kept_nothing_is_written(trained, tmp_path, monkeypatch):
    timed(monkeypatch, 0.5)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    report = compress(
        trained, CompressOptions(quantize="int8", max_drop=1.0, threads=1, runtime="onnx"), out=tmp_path / "small"
    )
    assert report.bundle is None and report.exit_code == 1 and not (tmp_path / "small").exists()
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_what_can_not_be_done_is_a_step_that_says_why(trained, tmp_path):
    report = compress(trained, CompressOptions(quantize="dynamic", threads=1, runtime="onnx"), out=tmp_path / "small")
    (step,) = report.steps
    assert not step.kept and "linear layers" in step.reason and step.verdict is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CompressOptions(), "nothing to do"),
        (CompressOptions(prune=1.5), "between 0 and 1"),
        (CompressOptions(sparsity=1.0), "sparsity"),
        (CompressOptions(qat=True), "nothing to do"),
        (CompressOptions(qat=True, quantize="dynamic"), "--quantize int8"),
        (CompressOptions(quantize="int8", max_drop=-1.0), "max-drop"),
        (CompressOptions(quantize="int8", calibration=0), "calibration"),
    ],
)
def test_settings_out_of_range_are_refused(trained, tmp_path, options, message):
    with pytest.raises(CompressionError, match=message):
        compress(trained, options, out=tmp_path / "small")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=phantom://ct-nodule-type?cases=12&size=16"], "trained on others"),
        (["data=phantom://xray-nodules?cases=30&size=32"], "training cases might judge"),
        (["split.fold=1"], "split"),
        (["preprocess.pad_multiple=8"], "preprocess"),
    ],
)
def test_other_cases_than_those_that_validated_are_refused(trained, tmp_path, words, message):
    with pytest.raises(CompressionError, match=message):
        compress(trained, CompressOptions(quantize="int8"), words, out=tmp_path / "x")


def test_folders_of_other_things_are_refused(trained, tmp_path):
    with pytest.raises(CompressionError, match="is the bundle itself"):
        compress(trained, CompressOptions(quantize="int8"), out=trained)
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(CompressionError, match="other files"):
        compress(trained, CompressOptions(quantize="int8"), out=tmp_path)
