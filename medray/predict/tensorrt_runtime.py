"""The TensorRT runtime (11.x, NVIDIA GPUs). Written to its documented API; it has not been run on a GPU.

TensorRT 11 knows strongly typed networks only: each layer computes in the type that the ONNX file gives it. fp32 takes
the file as it is (TF32 off, or logits would differ by more than fp32's rule allows), fp16 a copy whose tensors are
half, int8 a file with Q/DQ nodes. An engine is built once for each GPU, TensorRT version, ONNX file, precision and
range of shapes, and kept in a folder of the user's: a plan is a program that TensorRT runs, so that folder is trusted
as the user's own programs are, and nothing is read from a bundle but its ONNX file.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medray.errors import BundleError, MissingDependencyError, ModelError
from medray.predict.predictor import Floats

LARGEST_BATCH = 16
"""Of the optimisation profile; larger batches are cut."""
WORKSPACE = 4 << 30
"""Bytes of scratch memory that a layer's kernel may take."""
_PRECISIONS = ("fp32", "fp16", "int8")


class TensorRtPredictor:
    """An ONNX file in TensorRT. May be called from several threads: one at a time is let in.

    Args:
        path: the ``.onnx`` file: one float32 input (B, C, *s) with a dynamic batch, one output.
        shape: (C, *s) of the inputs to come.
        precision: fp32, fp16, or int8 for a file with quantised layers.
        cache: folder of built engines.
        device: index of the GPU.

    Raises:
        MissingDependencyError: tensorrt is not installed.
        ModelError: no GPU, or an unknown precision.
        BundleError: the file is missing, or TensorRT can't build it.
    """

    name = "tensorrt"

    def __init__(
        self, path: Path | str, *, shape: Sequence[int], cache: Path, precision: str = "fp32", device: int = 0
    ) -> None:
        try:
            import tensorrt as trt
        except ImportError:
            raise MissingDependencyError(
                "tensorrt", "the TensorRT runtime", "pip install 'medray[tensorrt]' (NVIDIA GPUs)"
            ) from None
        if precision not in _PRECISIONS:
            raise ModelError(f"TensorRT computes in {', '.join(_PRECISIONS)}, not {precision}. Choose one of these")
        if not torch.cuda.is_available():
            raise ModelError("TensorRT needs an NVIDIA GPU, and torch sees none. Use runtime=openvino or onnx")
        if not Path(path).is_file():
            raise BundleError(f"{path}: no such ONNX file. Write the bundle anew, or use runtime=torch")
        self.precision, self.shape = precision, tuple(int(n) for n in shape)
        self._device = _gpu(device)
        self._logger: Any = trt.Logger(trt.Logger.ERROR)
        plan = _plan(trt, self._logger, Path(path), self.shape, precision, cache, self._device)
        self._engine: Any = trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BundleError(f"{path}: TensorRT can't load the engine that it built. Empty {cache} and try again")
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise ModelError(f"TensorRT can't make a context for {path}: too little GPU memory, most likely")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BundleError(
                f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; a bundle's file has one each"
            )
        self._input, self._output = inputs[0], outputs[0]
        self._stream = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) float32 to logits (B, K[, *s]) float32.

        Raises:
            ModelError: another shape than the engine was built for.
        """
        if batch.shape[1:] != self.shape:
            raise ModelError(f"the TensorRT engine was built for images of {self.shape}, not {batch.shape[1:]}")
        array = np.ascontiguousarray(batch, dtype=np.float32)
        with self._lock:  # a context has one set of addresses
            parts = [self._run(array[at : at + LARGEST_BATCH]) for at in range(0, len(array), LARGEST_BATCH)]
        return np.concatenate(parts)

    def _run(self, array: Floats) -> Floats:
        with torch.cuda.stream(self._stream):  # PyTorch owns all memory; TensorRT is given addresses
            given = torch.from_numpy(np.array(array)).to(self._device)
            if not self._context.set_input_shape(self._input, tuple(given.shape)):
                raise ModelError(f"TensorRT refuses a batch of shape {tuple(given.shape)}")
            shape = tuple(self._context.get_tensor_shape(self._output))
            found = torch.empty(shape, dtype=torch.float32, device=self._device)
            self._context.set_tensor_address(self._input, given.data_ptr())
            self._context.set_tensor_address(self._output, found.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise ModelError("TensorRT failed to run the engine; its own log has the reason")
            self._stream.synchronize()
            return found.cpu().numpy()


def _gpu(index: int) -> torch.device:
    return torch.device("cuda", index)


def _plan(
    trt: Any, logger: Any, path: Path, shape: tuple[int, ...], precision: str, cache: Path, device: torch.device
) -> bytes:
    """The serialised engine: from the cache, or built now and put there."""
    model = path.read_bytes()
    facts = [
        torch.cuda.get_device_name(device),
        str(torch.cuda.get_device_capability(device)),
        str(trt.__version__),
        hashlib.sha256(model).hexdigest(),
        precision,
        f"{shape} x 1..{LARGEST_BATCH}",
    ]
    kept = cache / f"{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:40]}.plan"
    if kept.is_file():
        return kept.read_bytes()
    plan = _build(trt, logger, model if precision != "fp16" else _halved(path), shape, path)
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = kept.with_suffix(f".{threading.get_ident()}.part")
    partial.write_bytes(plan)
    partial.replace(kept)
    return plan


def _build(trt: Any, logger: Any, model: bytes, shape: tuple[int, ...], path: Path) -> bytes:
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))[:500]
        raise BundleError(f"{path}: TensorRT can't parse it ({reasons}). Use another runtime")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, (1, *shape), (min(4, LARGEST_BATCH), *shape), (LARGEST_BATCH, *shape))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(
            f"{path}: TensorRT can't build an engine of it; its own log has the reason. Use another runtime"
        )
    return bytes(plan)


def _halved(path: Path) -> bytes:
    """The ONNX file with half-precision tensors inside; input and output stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model: Any = convert_float_to_float16(onnx.load(str(path), load_external_data=False), keep_io_types=True)
    return bytes(model.SerializeToString())
