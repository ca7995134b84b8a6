from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig
from medray.models.catalogue import build_model
from medray.workflows.explanation import explain_files


def bundle_of(directory, kind, ndim, name, **fields):
    torch.manual_seed(0)
    config = ModelConfig(name=name, feature_size=8, **({"depth": 2} if name == "unet" else {}))
    side = (16,) * ndim
    model = build_model(config, kind=kind, ndim=ndim, in_channels=1, num_outputs=2, patch_size=side)
    return write_bundle(
        directory,
        kind=kind,
        ndim=ndim,
        channels=1,
        classes=["a", "b"],
        models=[model],
        configs=[config],
        onnx=False,
        **fields,
    ).directory


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_a_picture_gets_an_overlay_of_its_own_size(tmp_path, method):
    place = bundle_of(
        tmp_path / "b",
        "classification",
        2,
        "small_cnn",
        preprocess=PreprocessConfig(size=(32, 32)),
        inference=InferenceSpec(),
    )
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 60), dtype=np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "film.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = explain_files(
        place, [tmp_path / "film.png", tmp_path / "broken.png"], tmp_path / "out", method=method, target="b"
    )
    good = next(item for item in found if item.error is None)
    assert [item.error is None for item in found].count(True) == 1
    assert good.explanation.target_name == "b"
    drawn = Pillow.open(good.outputs[0])
    assert drawn.size == (60, 40) and drawn.mode == "RGB"
    assert "Research use only" in drawn.text["Description"]


def test_a_volume_gets_a_map_on_its_own_grid_and_slices(tmp_path):
    place = bundle_of(
        tmp_path / "b",
        "segmentation",
        3,
        "unet",
        preprocess=PreprocessConfig(spacing=(1.0, 1.0, 1.0)),
        inference=InferenceSpec(patch_size=(16, 16, 16)),
    )
    affine = np.array([[-2.0, 0, 0, 30], [0, 0, 1.5, -7], [0, -1.0, 0, 12], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(size=(12, 20, 9)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "scan.nii.gz")
    (found,) = explain_files(place, [tmp_path / "scan.nii.gz"], tmp_path / "out")
    assert found.error is None, found.error
    picture, volume = found.outputs
    written = nib.load(volume)
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert written.shape == values.shape and written.get_data_dtype() == np.float32
    heat = written.get_fdata()
    assert heat.min() >= 0 and heat.max() == pytest.approx(1.0)
    assert Pillow.open(picture).size[1] == 256
