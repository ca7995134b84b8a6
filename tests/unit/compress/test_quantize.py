from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from medray.compress.quantize import linear_share, quantize_dynamic, quantize_static
from medray.errors import CompressionError
from medray.predict.onnx_runtime import OnnxPredictor
from medray.predict.openvino_runtime import OpenVinoPredictor


def graph_of(path, nodes, weights, shape_in, shape_out):
    """An ONNX file of the given nodes; written by hand, since the exporter takes seconds."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape_in)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape_out)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory):
    """(B, 1, 8, 8, 8) to (B, 2, 8, 8, 8): 3-D, as most of the catalogue's segmenters."""
    rng = np.random.default_rng(0)
    weights = {
        "a": (rng.normal(size=(16, 1, 3, 3, 3)) * 0.3).astype(np.float32),
        "b": (rng.normal(size=(2, 16, 3, 3, 3)) * 0.1).astype(np.float32),
    }
    pads = {"kernel_shape": [3, 3, 3], "pads": [1] * 6}
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["x"], **pads),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "b"], ["logits"], **pads),
    ]
    return graph_of(
        tmp_path_factory.mktemp("c") / "c.onnx", nodes, weights, ["batch", 1, 8, 8, 8], ["batch", 2, 8, 8, 8]
    )


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """(B, 64) to (B, 3) by two matrices."""
    rng = np.random.default_rng(0)
    weights = {
        "a": (rng.normal(size=(64, 256)) * 0.1).astype(np.float32),
        "b": (rng.normal(size=(256, 3)) * 0.1).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["image", "a"], ["x"]),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("MatMul", ["y", "b"], ["logits"]),
    ]
    return graph_of(tmp_path_factory.mktemp("l") / "l.onnx", nodes, weights, ["batch", 64], ["batch", 3])


def cases(count, shape):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(1, *shape)).astype(np.float32) for _ in range(count)]


def test_static_is_near_small_and_runs_in_both_engines(convolutions, tmp_path):
    given = cases(8, (1, 8, 8, 8))
    assert quantize_static(convolutions, tmp_path / "q.onnx", iter(given)) == 8
    model = onnx.load(tmp_path / "q.onnx")
    kinds = {tensor.name: tensor for tensor in model.graph.initializer}
    held = [t for t in kinds.values() if len(t.dims) == 5]
    assert held and all(t.data_type == TensorProto.INT8 for t in held), "weights are signed"
    zeros = [t for name, t in kinds.items() if "zero_point" in name and t.data_type == TensorProto.UINT8]
    assert zeros, "activations are unsigned"
    scales = [t for name, t in kinds.items() if name.startswith("a") and "scale" in name]
    assert any(list(t.dims) == [16] for t in scales), "per channel"
    batch = np.concatenate(given[:3])
    wanted = OnnxPredictor(convolutions, threads=1)(batch)
    for engine in (OnnxPredictor, OpenVinoPredictor):
        found = engine(tmp_path / "q.onnx", threads=1, precision="int8")(batch)
        assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_static_needs_cases_and_something_to_quantise(convolutions, tmp_path):
    with pytest.raises(CompressionError, match="no calibration case"):
        quantize_static(convolutions, tmp_path / "q.onnx", iter(()))
    plain = graph_of(
        tmp_path / "p.onnx", [helper.make_node("Sigmoid", ["image"], ["logits"])], {}, ["batch", 4], ["batch", 4]
    )
    with pytest.raises(CompressionError, match="nothing was gained"):
        quantize_static(plain, tmp_path / "q.onnx", iter(cases(2, (4,))))


def test_dynamic_is_for_linear_layers(linear, convolutions, tmp_path):
    assert linear_share(linear) == 1.0 and linear_share(convolutions) == 0.0
    quantize_dynamic(linear, tmp_path / "q.onnx")
    batch = np.concatenate(cases(4, (64,)))
    wanted = OnnxPredictor(linear, threads=1)(batch)
    found = OnnxPredictor(tmp_path / "q.onnx", threads=1, precision="int8")(batch)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert (tmp_path / "q.onnx").stat().st_size < 0.5 * linear.stat().st_size
    with pytest.raises(CompressionError, match="0% of the weights lie in linear layers"):
        quantize_dynamic(convolutions, tmp_path / "r.onnx")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(torch.arange(9).numpy().tobytes())
    with pytest.raises(CompressionError):
        quantize_dynamic(tmp_path / "bad.onnx", tmp_path / "q.onnx")
