"""A small network as ONNX, and a TensorRT that computes on the CPU but holds to the documented API of 11.x."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medray.bundle.export import to_onnx
from medray.predict import tensorrt_runtime

SHAPE = (2, 9, 8)


@pytest.fixture(scope="session")
def small_network() -> nn.Module:
    """(B, 2, 9, 8) to (B, 3, 9, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()


@pytest.fixture(scope="session")
def small_onnx(small_network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(small_network, path, example=torch.randn(1, *SHAPE))
    return path


class FakeTensorRt(types.ModuleType):
    """What the documentation of TensorRT 11 promises, and no more: a name that it lacks is an AttributeError.

    ``built`` counts engines that were built. An engine computes by ONNX Runtime, from and to the addresses it is given.
    """

    __version__ = "11.4.1"

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.built = 0
        self.refuse = ""
        self.flags: set[str] = set()
        fake = self

        class Logger:
            ERROR = 1

            def __init__(self, level):
                assert level == Logger.ERROR

        class Network:
            model = b""
            num_layers = 0

            def get_input(self, index):
                assert index == 0 and self.model
                return types.SimpleNamespace(name="image")

        class Profile:
            def set_shape(self, name, least, best, most):
                assert name == "image" and all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))
                self.limits = least, most

        class Config:
            def __init__(self):
                self.flags, self.profiles, self.pools = {"TF32"}, [], {}

            def set_memory_pool_limit(self, pool, size):
                self.pools[pool] = size

            def clear_flag(self, flag):
                self.flags.discard(flag)

            def add_optimization_profile(self, profile):
                self.profiles.append(profile)
                return len(self.profiles) - 1

        class Builder:
            def __init__(self, logger):
                assert isinstance(logger, Logger)

            def create_network(self, flags=0):
                assert flags == 0, "always strongly typed in 11.x"
                return Network()

            def create_builder_config(self):
                return Config()

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                fake.built += 1
                fake.flags = set(config.flags)
                if fake.refuse == "build":
                    return None
                assert len(config.profiles) == 1, "a dynamic batch needs a profile"
                least, most = config.profiles[0].limits
                return repr((least, most)).encode() + b"\0" + network.model

        class OnnxParser:
            def __init__(self, network, logger):
                self._network = network
                self.num_errors = 0

            def parse(self, model):
                if fake.refuse == "parse":
                    self.num_errors = 1
                    return False
                self._network.model = model
                return True

            def get_error(self, index):
                return "In node 3: unsupported"

        class Runtime:
            def __init__(self, logger):
                pass

            def deserialize_cuda_engine(self, plan):
                assert isinstance(plan, bytes)
                return Engine(plan) if b"\0" in plan else None

        class Engine:
            num_io_tensors = 2

            def __init__(self, plan):
                import ast

                head, _, self.model = plan.partition(b"\0")
                self.limits = ast.literal_eval(head.decode())

            def get_tensor_name(self, index):
                return ("image", "logits")[index]

            def get_tensor_mode(self, name):
                return {"image": fake.TensorIOMode.INPUT, "logits": fake.TensorIOMode.OUTPUT}[name]

            def create_execution_context(self):
                return Context(self)

        class Context:
            def __init__(self, engine):
                import onnxruntime

                self._engine, self._shape, self._addresses = engine, None, {}
                self._session = onnxruntime.InferenceSession(engine.model, providers=["CPUExecutionProvider"])

            def set_input_shape(self, name, shape):
                least, most = self._engine.limits
                fits = name == "image" and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
                self._shape = tuple(shape) if fits else None
                return fits

            def get_tensor_shape(self, name):
                return {"image": self._shape, "logits": (self._shape[0], 3, *self._shape[2:])}[name]

            def set_tensor_address(self, name, address):
                self._addresses[name] = address
                return name in ("image", "logits")

            def execute_async_v3(self, stream_handle):
                if self._shape is None or set(self._addresses) != {"image", "logits"} or fake.refuse == "run":
                    return False
                count = int(np.prod(self._shape))
                given = (ctypes.c_float * count).from_address(self._addresses["image"])
                (found,) = self._session.run(None, {"image": np.array(given, np.float32).reshape(self._shape)})
                found = np.ascontiguousarray(found, dtype=np.float32)
                ctypes.memmove(self._addresses["logits"], found.ctypes.data, found.nbytes)
                return True

        self.Logger, self.Builder, self.OnnxParser, self.Runtime = Logger, Builder, OnnxParser, Runtime
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
        self.BuilderFlag = types.SimpleNamespace(TF32="TF32")
        self.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")


class _Stream:
    cuda_stream = 0

    def __init__(self, device=None):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def fake_tensorrt(monkeypatch):
    fake = FakeTensorRt()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(tensorrt_runtime, "_gpu", lambda index: torch.device("cpu"))
    return fake
