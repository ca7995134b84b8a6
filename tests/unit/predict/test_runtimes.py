"""One contract for every runtime, then what is each one's own. TensorRT is a fake here: it has not been run."""

from __future__ import annotations

import sys
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from medray.errors import BundleError, MissingDependencyError, ModelError
from medray.predict import openvino_runtime
from medray.predict.onnx_runtime import OnnxPredictor, usable_cpus
from medray.predict.openvino_runtime import OpenVinoPredictor, openvino_has_bf16
from medray.predict.tensorrt_runtime import LARGEST_BATCH, TensorRtPredictor
from medray.predict.torch_runtime import TorchPredictor

SHAPE = (2, 9, 8)
RUNTIMES = ("torch", "onnx", "openvino", "tensorrt")


@pytest.fixture
def make(small_network, small_onnx, tmp_path, request):
    """make(name): a predictor of the small network by that runtime."""

    def made(name, path=small_onnx, **fields):
        if name == "torch":
            return TorchPredictor(small_network, **fields)
        if name == "onnx":
            return OnnxPredictor(path, threads=1, **fields)
        if name == "openvino":
            return OpenVinoPredictor(path, threads=1, **fields)
        request.getfixturevalue("fake_tensorrt")
        return TensorRtPredictor(path, shape=SHAPE, cache=tmp_path / "engines", **fields)

    return made


def batch_of(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", RUNTIMES)
class TestContract:
    def test_it_says_what_it_is(self, make, name):
        made = make(name)
        assert (made.name, made.precision) == (name, "fp32")

    @pytest.mark.parametrize("count", [1, 5, LARGEST_BATCH + 1])
    def test_the_same_logits_as_torch_for_any_batch(self, make, name, count, small_network):
        batch = batch_of(count)
        with torch.no_grad():
            wanted = small_network(torch.from_numpy(batch)).numpy()
        found = make(name)(batch)
        assert found.dtype == np.float32 and found.flags.writeable
        np.testing.assert_allclose(found, wanted, atol=1e-5)

    def test_an_answer_outlives_the_next_call(self, make, name):
        made = make(name)
        first = made(batch_of(2, seed=1))
        kept = first.copy()
        made(batch_of(2, seed=2))
        assert (first == kept).all()

    def test_the_input_may_be_read_only_strided_and_stays_as_it_was(self, make, name):
        made, batch = make(name), batch_of(2)
        wanted = made(batch)
        turned = np.asfortranarray(batch)
        turned.flags.writeable = False
        np.testing.assert_allclose(made(turned), wanted, atol=1e-6)
        assert (turned == batch).all()

    def test_threads_do_not_mix_their_answers(self, make, name):
        made = make(name)
        batches = [batch_of(2, seed) for seed in range(4)]
        wanted = [made(batch) for batch in batches]
        wrong = []

        def call(index):
            for _ in range(5):
                if np.abs(made(batches[index]) - wanted[index]).max() > 1e-6:
                    wrong.append(index)

        threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_an_unknown_precision_is_refused(self, make, name):
        if name == "onnx":
            pytest.skip("its precision is the file's")
        with pytest.raises(ModelError, match="fp32"):
            make(name, precision="fp8")


@pytest.mark.parametrize("name", ["onnx", "openvino", "tensorrt"])
class TestFiles:
    def test_what_is_not_there_is_said(self, make, name, tmp_path):
        with pytest.raises(BundleError, match="no such ONNX"):
            make(name, tmp_path / "none.onnx")

    def test_a_shape_that_does_not_fit_is_refused(self, make, name):
        with pytest.raises(ModelError, match=r"shape|images of"):
            make(name)(np.zeros((1, 3, 9, 8), np.float32))


@pytest.mark.parametrize("kind", [OnnxPredictor, OpenVinoPredictor])
def test_garbage_and_no_threads_are_refused(tmp_path, kind):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x01garbage")
    with pytest.raises(BundleError, match="can't load"):
        kind(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="at least 1"):
        kind(tmp_path / "bad.onnx", threads=0)


def test_threads_are_the_process_s_own(small_onnx):
    for kind in (OnnxPredictor, OpenVinoPredictor):
        assert kind(small_onnx).threads == usable_cpus()
        assert kind(small_onnx, threads=1).threads == 1
    assert OpenVinoPredictor(small_onnx, threads=1)._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_openvino_computes_in_fp32_unless_asked(small_onnx):
    import openvino

    made = OpenVinoPredictor(small_onnx, threads=1)
    assert made._compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_openvino_has_bf16_only_where_the_cpu_has(small_onnx, small_network, monkeypatch):
    if openvino_has_bf16():
        batch = batch_of(2)
        half = OpenVinoPredictor(small_onnx, threads=1, precision="bf16")(batch)
        assert 0 < np.abs(half - TorchPredictor(small_network)(batch)).max() < 0.05
    monkeypatch.setattr(openvino_runtime, "openvino_has_bf16", lambda: False)
    with pytest.raises(ModelError, match="no bfloat16"):
        OpenVinoPredictor(small_onnx, precision="bf16")


def test_onnx_runtime_refuses_providers_that_are_not_here(small_onnx):
    with pytest.raises(ModelError, match="no provider"):
        OnnxPredictor(small_onnx, provider="tpu")
    assert onnxruntime.get_available_providers()


def test_torch_runs_in_evaluation_and_without_gradients():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.9)).train()
    predictor = TorchPredictor(model)
    batch = np.ones((2, 1, 4, 4), dtype=np.float32)
    assert (predictor(batch) == predictor(batch)).all()
    model.train()
    assert (predictor(batch) == predictor(batch)).all()


def test_torch_leaves_its_input_to_an_in_place_network():
    batch = np.ones((1, 1, 4, 4), dtype=np.float32)
    batch.flags.writeable = False
    assert TorchPredictor(nn.ReLU(inplace=True))(-batch).max() == 0
    assert (batch == 1).all()


def test_bf16_is_near_but_not_the_same():
    torch.manual_seed(0)
    model = nn.Conv2d(4, 3, 3)
    batch = np.random.default_rng(0).normal(size=(1, 4, 9, 9)).astype(np.float32)
    exact, half = TorchPredictor(model)(batch), TorchPredictor(model, precision="bf16")(batch)
    assert 0 < np.abs(exact - half).max() < 0.05


def test_cuda_is_missed_where_it_is_not():
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA"):
            TorchPredictor(nn.ReLU(), device="cuda")


class TestTensorRt:
    def test_it_is_missed_where_it_is_not_installed(self, small_onnx, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(MissingDependencyError, match="tensorrt"):
            TensorRtPredictor(small_onnx, shape=SHAPE, cache=tmp_path)

    def test_an_engine_is_built_once_for_each_gpu_version_file_precision_and_shape(
        self, small_onnx, tmp_path, fake_tensorrt, monkeypatch
    ):
        def built(path=small_onnx, **fields):
            before = fake_tensorrt.built
            TensorRtPredictor(path, **({"shape": SHAPE, "cache": tmp_path / "engines"} | fields))
            return fake_tensorrt.built - before

        assert built() == 1 and built() == 0
        assert built(shape=(2, 8, 8)) == 1
        assert built(precision="int8") == 1
        other = tmp_path / "other.onnx"
        model = onnx.load(small_onnx)
        model.doc_string = "another file"
        onnx.save(model, other)
        assert built(other) == 1
        monkeypatch.setattr(fake_tensorrt, "__version__", "11.5.0")
        assert built() == 1 and built() == 0
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Other GPU")
        assert built() == 1
        assert all(path.suffix == ".plan" for path in (tmp_path / "engines").iterdir())

    def test_tf32_is_off(self, small_onnx, tmp_path, fake_tensorrt):
        TensorRtPredictor(small_onnx, shape=SHAPE, cache=tmp_path)
        assert "TF32" not in fake_tensorrt.flags

    def test_fp16_has_half_tensors_inside_and_float_ones_outside(self, small_onnx, tmp_path, fake_tensorrt):
        TensorRtPredictor(small_onnx, shape=SHAPE, cache=tmp_path, precision="fp16")
        plan = next(tmp_path.glob("*.plan")).read_bytes()
        model = onnx.load_model_from_string(plan.partition(b"\0")[2])
        kinds = {tensor.data_type for tensor in model.graph.initializer}
        assert kinds == {onnx.TensorProto.FLOAT16}
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT

    @pytest.mark.parametrize(("what", "message"), [("parse", "node 3"), ("build", "can't build")])
    def test_what_it_refuses_is_said(self, small_onnx, tmp_path, fake_tensorrt, what, message):
        fake_tensorrt.refuse = what
        with pytest.raises(BundleError, match=message):
            TensorRtPredictor(small_onnx, shape=SHAPE, cache=tmp_path)

    def test_a_failed_run_is_no_answer(self, small_onnx, tmp_path, fake_tensorrt):
        made = TensorRtPredictor(small_onnx, shape=SHAPE, cache=tmp_path)
        fake_tensorrt.refuse = "run"
        with pytest.raises(ModelError, match="failed to run"):
            made(batch_of(1))
