from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medray.errors import BundleError, ModelError
from medray.predict.onnx_runtime import OnnxPredictor
from medray.predict.torch_runtime import TorchPredictor


def test_torch_runs_in_evaluation_and_without_gradients():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.9)).train()
    predictor = TorchPredictor(model)
    batch = np.ones((2, 1, 4, 4), dtype=np.float32)
    assert (predictor(batch) == predictor(batch)).all()
    model.train()
    assert (predictor(batch) == predictor(batch)).all()
    assert predictor(batch).dtype == np.float32


def test_read_only_input_is_accepted_and_left_alone():
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


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ModelError, match="fp32, bf16"):
        TorchPredictor(nn.ReLU(), precision="fp8")
    with pytest.raises(BundleError, match="no such ONNX"):
        OnnxPredictor(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x01garbage")
    with pytest.raises(BundleError, match="can't load"):
        OnnxPredictor(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="at least 1"):
        OnnxPredictor(tmp_path / "bad.onnx", threads=0)
    with pytest.raises(ModelError, match="no provider"):
        OnnxPredictor(tmp_path / "bad.onnx", provider="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA"):
            TorchPredictor(nn.ReLU(), device="cuda")
