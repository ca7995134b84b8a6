"""Real exports in the real ONNX Runtime: the same numbers as torch, for any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medray.bundle.ensemble import combine
from medray.bundle.export import to_onnx
from medray.bundle.read import Bundle
from medray.bundle.spec import InferenceSpec
from medray.bundle.verify import LOGITS
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig
from medray.data.image import Image
from medray.errors import BundleError
from medray.models.catalogue import build_model
from medray.predict.onnx_runtime import OnnxPredictor
from medray.predict.torch_runtime import TorchPredictor

CASES = [
    ("unet", "segmentation", 2, (32, 32)),
    ("unet", "segmentation", 3, (16, 16, 16)),
    ("resnet18", "classification", 2, (32, 32)),
]


def network(name, kind, ndim, size, *, members=1, channels=1, outputs=3):
    torch.manual_seed(0)
    config = ModelConfig(name=name)
    models = [
        build_model(config, kind=kind, ndim=ndim, in_channels=channels, num_outputs=outputs, patch_size=size).eval()
        for _ in range(members)
    ]
    return models, [config] * members


@pytest.mark.parametrize(("name", "kind", "ndim", "size"), CASES)
@pytest.mark.parametrize("members", [1, 2])
def test_the_same_logits_for_any_batch(tmp_path, name, kind, ndim, size, members):
    models, _ = network(name, kind, ndim, size, members=members)
    whole = combine(models, kind)
    to_onnx(whole, tmp_path / "model.onnx", example=torch.randn(1, 1, *size))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"], "weights are inside"
    onnx, reference = OnnxPredictor(tmp_path / "model.onnx", threads=1), TorchPredictor(whole)
    for count in (1, 3, 5):
        batch = np.random.default_rng(count).normal(size=(count, 1, *size)).astype(np.float32)
        assert np.abs(onnx(batch) - reference(batch)).max() <= LOGITS


def test_whole_images_of_any_size(tmp_path):
    models, _ = network("unet", "segmentation", 2, None)
    to_onnx(models[0], tmp_path / "model.onnx", example=torch.randn(1, 1, 64, 64), dynamic_spatial=True)
    onnx, reference = OnnxPredictor(tmp_path / "model.onnx", threads=1), TorchPredictor(models[0])
    for shape in ((64, 64), (96, 128), (32, 160)):
        batch = np.random.default_rng(0).normal(size=(1, 1, *shape)).astype(np.float32)
        assert np.abs(onnx(batch) - reference(batch)).max() <= LOGITS


def test_a_bundle_answers_alike_by_both_runtimes(tmp_path):
    models, configs = network("unet", "segmentation", 3, (16, 16, 16), members=2)
    bundle = write_bundle(
        tmp_path / "bundle",
        kind="segmentation",
        ndim=3,
        channels=1,
        classes=["background", "one", "two"],
        preprocess=PreprocessConfig(spacing=(1.0, 1.0, 1.0)),
        inference=InferenceSpec(patch_size=(16, 16, 16), flip_axes=(0,), batch_size=2),
        models=models,
        configs=configs,
    )
    assert bundle.runtimes == ("torch", "onnx", "openvino")
    rng = np.random.default_rng(0)
    image = Image(array=rng.normal(size=(1, 20, 25, 11)).astype(np.float32), spacing=(1.0, 1.2, 2.0))
    answers = [
        bundle.predict(image, bundle.predictor(name, threads=1), with_probabilities=True) for name in bundle.runtimes
    ]
    np.testing.assert_allclose(answers[0].probabilities, answers[1].probabilities, atol=1e-3)
    assert (answers[0].labels == answers[1].labels).mean() > 0.999


def test_an_onnx_file_of_other_weights_is_found_out(tmp_path):
    models, configs = network("unet", "segmentation", 2, (32, 32), members=2)
    fields = {
        "kind": "segmentation",
        "ndim": 2,
        "channels": 1,
        "classes": ["a", "b", "c"],
        "preprocess": PreprocessConfig(),
        "inference": InferenceSpec(patch_size=(32, 32)),
    }
    ours = write_bundle(tmp_path / "a", models=models[:1], configs=configs[:1], **fields)
    theirs = write_bundle(tmp_path / "b", models=models[1:], configs=configs[1:], **fields)
    (ours.directory / "model.onnx").write_bytes((theirs.directory / "model.onnx").read_bytes())
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(ours.directory)
    with pytest.raises(BundleError, match="golden outputs"):  # opened before the file was changed
        ours.predictor("onnx", threads=1)


def test_external_data_outside_of_the_file_is_never_read(tmp_path):
    """A hostile ONNX file may name any path as the place of its weights."""
    from onnx import TensorProto, helper

    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "bundle").mkdir()
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret.bin")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    path = tmp_path / "bundle/model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )
    with pytest.raises(BundleError, match="can't load"):
        OnnxPredictor(path, threads=1)


def test_threads_are_set_and_do_not_spin(tmp_path):
    models, _ = network("unet", "segmentation", 2, (32, 32))
    to_onnx(models[0], tmp_path / "model.onnx", example=torch.randn(1, 1, 32, 32))
    predictor = OnnxPredictor(tmp_path / "model.onnx", threads=1)
    options = predictor._session.get_session_options()
    assert options.intra_op_num_threads == 1 and options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert OnnxPredictor(tmp_path / "model.onnx").threads >= 1
