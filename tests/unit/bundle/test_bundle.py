from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from medray.bundle.ensemble import EnsembleModel
from medray.bundle.read import Bundle
from medray.bundle.spec import INTENDED_USE, InferenceSpec
from medray.bundle.verify import compare
from medray.bundle.write import write_bundle
from medray.config.schema import Experiment, ModelConfig, PreprocessConfig
from medray.data.image import Image
from medray.errors import BundleError, DataError


def image(*shape, seed=0, spacing=None):
    array = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    return Image(array=array, spacing=spacing, source="noise")


def test_what_a_bundle_holds(tmp_path, write_tiny):
    bundle = write_tiny(tmp_path / "b", experiment=Experiment(), metrics={"test/dice": 0.5, "val/dice": None})
    names = {path.relative_to(bundle.directory).as_posix() for path in bundle.directory.rglob("*") if path.is_file()}
    assert names == {
        "bundle.json",
        "card.md",
        "experiment.yaml",
        "golden.safetensors",
        "weights/member-0.safetensors",
    }
    assert set(bundle.spec.files) == names - {"bundle.json"}
    tree = json.loads((bundle.directory / "bundle.json").read_text())
    assert tree["intended_use"] == INTENDED_USE
    assert tree["versions"]["torch"] and tree["created"]
    card = (bundle.directory / "card.md").read_text()
    for words in (
        "Research use only. Not a medical device.",
        "## Intended use",
        "## Limits",
        "test/dice | 0.5",
        "tiny",
    ):
        assert words in card
    assert not [path for path in tmp_path.iterdir() if path.name != "b"], "no temporary folder stays"


def test_a_failed_write_leaves_the_old_bundle(tmp_path, write_tiny):
    before = write_tiny(tmp_path / "b").spec.created
    with pytest.raises(BundleError, match="3 outputs for 2 classes"):
        write_tiny(tmp_path / "b", classes=["a", "b"])
    assert Bundle.open(tmp_path / "b").spec.created == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path, write_tiny):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("years")
    with pytest.raises(BundleError, match="not a bundle"):
        write_tiny(tmp_path / "b")
    assert (tmp_path / "b/thesis.txt").read_text() == "years"


def test_writing_does_not_touch_the_models(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 1)).train()
    with pytest.raises(BundleError):  # the catalogue's twin is another network
        write_bundle(
            tmp_path / "b",
            kind="segmentation",
            ndim=2,
            channels=1,
            classes=["a", "b"],
            preprocess=PreprocessConfig(),
            inference=InferenceSpec(patch_size=(8, 8)),
            models=[model],
            configs=[ModelConfig(name="tiny", feature_size=4)],
            onnx=False,
        )
    assert model.training
    assert not (tmp_path / "b").exists()


def test_a_segmentation_answer_lies_on_the_image_grid(pristine):
    given = image(23, 40)
    found = Bundle.open(pristine).predict(given, with_probabilities=True)
    assert found.labels.shape == (23, 40) and found.labels.dtype == np.uint8
    assert found.probabilities.shape == (3, 23, 40)
    assert (found.probabilities.argmax(axis=0) == found.labels).mean() > 0.999
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-4)
    assert set(found.seconds) == {"prepare", "network", "finish"}


def test_large_images_take_the_slab_way_to_the_same_labels(pristine, monkeypatch):
    bundle, given = Bundle.open(pristine), image(100, 40)
    whole = bundle.predict(given).labels
    monkeypatch.setattr("medray.bundle.read.MEMORY_LIMIT", 4 * 3 * 40 * 40)
    assert (bundle.predict(given).labels == whole).mean() > 0.999


def test_resampled_and_cropped_images_come_back(tmp_path, write_tiny):
    config = PreprocessConfig(spacing=(2.0, 2.0), crop_foreground=True)
    bundle = write_tiny(tmp_path / "b", preprocess=config)
    array = np.zeros((1, 50, 70), dtype=np.float32)
    array[0, 5:45, 10:60] = np.random.default_rng(0).normal(size=(40, 50)) + 5
    found = bundle.predict(Image(array=array, spacing=(1.0, 1.0)), with_probabilities=True)
    assert found.labels.shape == (50, 70)
    assert (found.labels[:5] == 0).all()
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-4)


def test_calibration_changes_probabilities_but_no_decision(tmp_path, write_tiny):
    plain = write_tiny(tmp_path / "a", "classification", outputs=3)
    warm = write_tiny(tmp_path / "b", "classification", outputs=3, temperature=5.0)
    one, other = plain.predict(image(30, 30)), warm.predict(image(30, 30))
    assert one.decisions == other.decisions
    assert other.probabilities.max() < one.probabilities.max()
    np.testing.assert_allclose(other.probabilities.sum(), 1, atol=1e-5)


def test_multilabel_decides_by_thresholds(tmp_path, write_tiny):
    low = write_tiny(tmp_path / "a", "multilabel", outputs=2, thresholds=(0.0, 1.0))
    found = low.predict(image(30, 30))
    assert found.decisions == (0,)
    assert found.probabilities.shape == (2,)


def test_images_of_another_kind_are_refused(pristine):
    bundle = Bundle.open(pristine)
    with pytest.raises(DataError, match="3-D with 1"):
        bundle.predict(image(8, 8, 8))
    with pytest.raises(DataError, match="2-D with 3"):
        bundle.predict(Image(array=np.zeros((3, 8, 8), np.float32), spacing=None))


def test_predictors_are_kept_and_onnx_is_missed(pristine):
    bundle = Bundle.open(pristine)
    assert bundle.predictor() is bundle.predictor()
    assert bundle.runtimes == ("torch",)
    with pytest.raises(BundleError, match="holds nothing for runtime 'onnx'"):
        bundle.predictor("onnx")


@pytest.mark.parametrize("kind", ["classification", "segmentation", "multilabel"])
def test_an_ensemble_averages_probabilities(kind):
    torch.manual_seed(0)
    members = [nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)]
    x = torch.randn(2, 1, 5, 5)
    turn = torch.sigmoid if kind == "multilabel" else lambda z: torch.softmax(z, dim=1)
    mean = torch.stack([turn(member(x)) for member in members]).mean(dim=0)
    torch.testing.assert_close(turn(EnsembleModel(members, kind)(x)), mean)


def test_a_sure_ensemble_stays_finite():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.tensor([[200.0, -200.0]])

    for kind in ("classification", "multilabel"):
        assert torch.isfinite(EnsembleModel([Sure(), Sure()], kind)(torch.zeros(1))).all()


def test_an_ensemble_bundle_reads_back(tmp_path, write_tiny):
    bundle = write_tiny(tmp_path / "b", members=3)
    assert len(bundle.spec.weight_files) == 3
    assert isinstance(bundle.model(), EnsembleModel)


@pytest.mark.parametrize(
    ("precision", "noise", "met"),
    [("fp32", 5e-4, True), ("fp32", 2e-3, False), ("bf16", 0.005, True), ("bf16", 1.0, False)],
)
def test_the_parity_rule(precision, noise, met):
    golden = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32) * 4
    shifted = golden + np.float32(noise) * np.sign(np.random.default_rng(1).normal(size=golden.shape)).astype(
        np.float32
    )
    assert compare("x", precision, shifted, golden, "segmentation").met is met


def test_answers_are_alike_at_the_bundle_s_temperature():
    """Grades 1 apart at temperature 1 are the same grade at 1.5, and the other way round."""
    golden, other = np.full((1, 4), 1.5, np.float32), np.full((1, 4), 1.7, np.float32)
    assert compare("x", "fp16", other, golden, "ordinal").alike == 0.0
    assert compare("x", "fp16", other, golden, "ordinal", 1.5).alike == 1.0
    golden, other = np.full((1, 4), 1.31, np.float32), np.full((1, 4), 1.335, np.float32)
    assert compare("x", "fp16", other, golden, "ordinal").alike == 1.0
    assert compare("x", "fp16", other, golden, "ordinal", 1.5).alike == 0.0


def test_nan_never_passes():
    golden = np.zeros((1, 2), np.float32)
    assert not compare("x", "fp32", np.full((1, 2), np.nan, np.float32), golden, "classification").met
    with pytest.raises(BundleError, match="shape"):
        compare("x", "fp32", np.zeros((1, 3), np.float32), golden, "classification")


def test_names_cannot_break_the_card(tmp_path, write_tiny):
    bundle = write_tiny(tmp_path / "b", classes=["a|b", "<script>", "c\n# d"])
    card = (bundle.directory / "card.md").read_text()
    assert "<script>" not in card and "\n# d" not in card
