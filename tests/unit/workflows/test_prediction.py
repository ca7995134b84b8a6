"""predict_files and evaluate with small untrained networks: what comes out for what goes in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from medray.bundle.read import Bundle
from medray.bundle.spec import INTENDED_USE, InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import Experiment, ModelConfig, PreprocessConfig
from medray.data.layouts import build_manifest
from medray.errors import BundleError, DataError
from medray.models.catalogue import build_model
from medray.workflows.evaluation import evaluate
from medray.workflows.inputs import expand
from medray.workflows.prediction import predict_files

FINDINGS = ["cardiomegaly", "effusion", "nodule"]


def make(directory, kind, ndim, classes, *, channels=1, seed=0, **fields):
    name = "unet" if kind == "segmentation" else "small_cnn"
    config = ModelConfig(name=name, feature_size=4, depth=2) if kind == "segmentation" else ModelConfig(name=name)
    size = (16,) * ndim if kind == "segmentation" else (32,) * ndim
    torch.manual_seed(seed)
    model = build_model(config, kind=kind, ndim=ndim, in_channels=channels, num_outputs=len(classes), patch_size=size)
    given = {
        "name": f"{kind}-{seed}",
        "preprocess": PreprocessConfig(size=None if kind == "segmentation" else size),
        "inference": InferenceSpec(patch_size=size if kind == "segmentation" else None, batch_size=4),
        "onnx": False,
    } | fields
    return write_bundle(
        directory, kind=kind, ndim=ndim, channels=channels, classes=classes, models=[model], configs=[config], **given
    ).directory


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "seg2": make(folder / "seg2", "segmentation", 2, ["background", "vessel"], channels=3),
        "seg3": make(folder / "seg3", "segmentation", 3, ["background", "liver", "lesion"]),
        "cls": make(folder / "cls", "classification", 2, ["normal", "nodule"], temperature=2.0),
        "cls-other": make(folder / "other", "classification", 2, ["normal", "nodule"], seed=1),
        "multi": make(
            folder / "multi", "multilabel", 2, ["cardiomegaly", "effusion", "nodule"], thresholds=[0.0, 0.5, 1.0]
        ),
    }


def write_nifti(path: Path, shape=(20, 18, 9), seed=0):
    affine = np.array([[-0.9, 0.1, 0, 5], [0.1, 0, -2.0, 6], [0, -0.9, 0.1, 7], [0, 0, 0, 1.0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.random.default_rng(seed).normal(size=shape).astype(np.float32), affine), path)


def write_png(path: Path, shape=(40, 36), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)).save(path)


def test_nifti_in_nifti_out_and_one_bad_file_stops_nothing(bundles, tmp_path):
    write_nifti(tmp_path / "in/a.nii.gz")
    write_nifti(tmp_path / "in/deep/a.nii.gz", seed=1)
    (tmp_path / "in/broken.nii.gz").write_bytes(b"not a scan")
    (tmp_path / "in/notes.txt").write_text("no image")
    calls = []
    summary = predict_files(
        bundles["seg3"], [tmp_path / "in"], tmp_path / "out", progress=lambda *what: calls.append(what)
    )
    assert summary.exit_code == 1
    assert [Path(answer.image).name for answer in summary.failed] == ["broken.nii.gz"]
    assert calls[-1][:2] == (3, 3)
    for name in ("a_seg.nii.gz", "deep/a_seg.nii.gz"):
        answer, source = nib.load(tmp_path / "out" / name), nib.load(tmp_path / "in" / name.replace("_seg", ""))
        assert answer.shape == source.shape
        np.testing.assert_allclose(answer.affine, source.affine, atol=1e-4)
    told = json.loads((tmp_path / "out/summary.json").read_text())
    assert told["intended_use"] == INTENDED_USE and len(told["answers"]) == 3


def test_dicom_in_dicom_seg_out(bundles, tmp_path, shared_data):
    import highdicom as hd

    series = shared_data / "dicom/pydicom-test_files/test_files/dicomdirtests/98892001/CT5N"
    summary = predict_files(bundles["seg3"], [series], tmp_path)
    assert summary.exit_code == 0, summary.failed
    seg = hd.seg.segread(tmp_path / summary.answers[0].output)
    assert seg.ContentDescription == INTENDED_USE
    assert {item.SegmentLabel for item in seg.SegmentSequence} <= {"liver", "lesion"}


def test_pictures_in_masks_and_overlays_out(bundles, tmp_path):
    write_png(tmp_path / "in/a.png", (40, 36, 3))
    summary = predict_files(bundles["seg2"], [str(tmp_path / "in/*.png")], tmp_path / "out", overlays=True)
    assert summary.exit_code == 0
    assert Pillow.open(tmp_path / "out/a_seg.png").size == (36, 40)
    assert Pillow.open(tmp_path / "out/a_seg_overlay.png").size == (36, 40)


def test_pictures_in_a_table_of_calibrated_probabilities_out(bundles, tmp_path):
    for seed in range(3):
        write_png(tmp_path / f"in/{seed}.png", seed=seed)
    (tmp_path / "in/9.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    summary = predict_files(bundles["cls"], [tmp_path / "in"], tmp_path / "out")
    assert summary.exit_code == 1
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows[:3]:
        assert float(row["p_normal"]) + float(row["p_nodule"]) == pytest.approx(1.0, abs=1e-5)
        assert row["prediction"] == max(("normal", "nodule"), key=lambda name: float(row[f"p_{name}"]))
        assert row["intended_use"] == INTENDED_USE
    assert rows[3]["error"] and not rows[3]["prediction"]


def test_multilabel_names_each_label_at_its_threshold(bundles, tmp_path):
    write_png(tmp_path / "a.png")
    summary = predict_files(bundles["multi"], [tmp_path / "a.png"], tmp_path / "out")
    assert "cardiomegaly" in summary.answers[0].classes and "nodule" not in summary.answers[0].classes


def test_references_are_inputs_too(bundles, tmp_path):
    summary = predict_files(bundles["cls"], ["phantom://xray-nodules?seed=0&index=3&size=48x48"], tmp_path)
    assert summary.exit_code == 0


def test_images_of_the_wrong_kind_fail_one_by_one(bundles, tmp_path):
    write_png(tmp_path / "a.png")
    summary = predict_files(bundles["seg3"], [tmp_path / "a.png"], tmp_path / "out")
    assert summary.exit_code == 1 and "3-D" in (summary.failed[0].error or "")


def test_no_image_or_no_bundle_is_an_error_at_once(bundles, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        predict_files(bundles["cls"], [tmp_path / "none.png"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        predict_files(bundles["cls"], [tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(BundleError):
        predict_files(tmp_path / "empty", ["x.png"], tmp_path / "out")


def test_inputs_are_named_apart_and_channels_joined(tmp_path):
    for name in ("x/a.png", "y/a.png", "x/A.jpg"):
        write_png(tmp_path / name)
    found = expand(
        [str(tmp_path / "x/a.png"), str(tmp_path / "y/a.png"), str(tmp_path / "x/A.jpg")], ndim=2, channels=1
    )
    assert [item.name for item in found] == ["a", "a-2", "A-3"]
    for name in ("p_0001.nii.gz", "p_0000.nii.gz", "q_0000.nii.gz", "q_0001.nii.gz"):
        write_nifti(tmp_path / "mr" / name)
    joined = expand([str(tmp_path / "mr")], ndim=3, channels=2)
    assert [item.name for item in joined] == ["p", "q"]
    assert [Path(reference).name for reference in joined[0].references] == ["p_0000.nii.gz", "p_0001.nii.gz"]


def test_names_never_leave_the_output_folder(bundles, tmp_path):
    write_png(tmp_path / "in/a.png")
    summary = predict_files(bundles["cls"], [str(tmp_path / "in/../in")], tmp_path / "out")
    assert summary.exit_code == 0
    assert all(".." not in item.name for item in expand(["phantom://../../x?index=1"], ndim=2, channels=1))


def test_evaluate_segmentation(bundles, tmp_path):
    found = evaluate(bundles["seg3"], "phantom://ct-lesions?seed=0&cases=6&size=24", out=tmp_path / "e")
    assert found.cases == 6 and found.patients <= 6
    assert set(found.metrics) == {
        *("dice", "hd95_mm", "dice/liver", "dice/lesion", "hd95_mm/liver", "hd95_mm/lesion"),
    }
    mean = np.nanmean([[row["dice/liver"], row["dice/lesion"]] for row in found.rows], axis=0).mean()
    assert found.metrics["dice"].value == pytest.approx(mean)
    assert found.metrics["dice"].low <= found.metrics["dice"].value <= found.metrics["dice"].high
    assert sum(site["cases"] for site in found.sites.values()) == 6
    told = json.loads((tmp_path / "e/evaluation.json").read_text())
    with (tmp_path / "e/cases.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [row["id"] for row in found.rows]
    assert told["metrics"]["dice"]["value"] == pytest.approx(mean)
    assert told["intended_use"] == INTENDED_USE


def test_evaluate_respects_the_field_of_view(bundles):
    manifest = build_manifest("phantom://fundus-vessels?seed=0&cases=3&size=48")
    with_valid = evaluate(bundles["seg2"], manifest)
    cases = tuple(case.model_copy(update={"valid": None}) for case in manifest.cases)
    without = evaluate(bundles["seg2"], manifest.model_copy(update={"cases": cases}))
    assert with_valid.metrics["dice"].value != without.metrics["dice"].value


def test_evaluate_classification_and_compare(bundles):
    data = "phantom://xray-nodules?seed=0&cases=16&size=48"
    found = evaluate(bundles["cls"], data, compare=bundles["cls-other"])
    assert {"auc", "accuracy", "brier"} <= set(found.metrics)
    assert np.sum(found.confusion) == 16
    comparison = found.comparison
    for name, interval in comparison.difference.items():
        assert interval.value == pytest.approx(
            found.metrics[name].value - comparison.other_metrics[name].value, abs=1e-9
        )
    same = evaluate(bundles["cls"], data, compare=bundles["cls"])
    assert same.comparison.difference["auc"].value == 0
    with pytest.raises(DataError, match="can't be compared"):
        evaluate(bundles["cls"], data, compare=bundles["multi"])


def test_evaluate_maps_classes_by_name(bundles):
    manifest = build_manifest("phantom://xray-nodules?seed=0&cases=12&size=48")
    turned = manifest.model_copy(
        update={
            "classes": ("nodule", "normal"),
            "cases": tuple(case.model_copy(update={"label": 1 - case.label}) for case in manifest.cases),
        }
    )
    assert evaluate(bundles["cls"], turned).metrics == evaluate(bundles["cls"], manifest).metrics
    named = evaluate(bundles["cls"], manifest.model_copy(update={"classes": ("0", "1")}))
    assert "same in this order" in named.notes[0]
    with pytest.raises(DataError, match="unknown to bundle"):
        evaluate(bundles["cls"], manifest.model_copy(update={"classes": ("normal", "fracture", "nodule")}))


def test_evaluate_takes_the_test_cases_and_names_what_failed(bundles, tmp_path):
    manifest = build_manifest("phantom://xray-findings?seed=0&cases=8&size=48")
    cases = [case.model_copy(update={"split": "test" if i < 5 else "train"}) for i, case in enumerate(manifest.cases)]
    cases[0] = cases[0].model_copy(update={"images": ("gone.png",)})
    split = manifest.model_copy(update={"cases": tuple(cases), "root": str(tmp_path)})
    found = evaluate(bundles["multi"], split)
    assert (found.split, found.cases) == ("test", 4)
    assert [case for case, _ in found.failed] == [cases[0].id]
    assert evaluate(bundles["multi"], split, split="all").cases == 7
    with pytest.raises(DataError, match="split"):
        evaluate(bundles["multi"], split, split="val")
    with pytest.raises(DataError, match="its task is multilabel"):
        evaluate(Bundle.open(bundles["cls"]), split)


def test_evaluate_says_where_the_bundle_was_trained_on_the_same_data(bundles, tmp_path):
    data = "phantom://xray-nodules?seed=0&cases=8&size=48"
    trained = make(tmp_path / "b", "classification", 2, ["normal", "nodule"], experiment=Experiment(data=data))
    assert "optimistic" in evaluate(trained, data).notes[0]
    assert not evaluate(trained, data.replace("seed=0", "seed=1")).notes
