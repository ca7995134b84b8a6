"""The OpenVINO runtime (CPU)."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medray.errors import BundleError, MissingDependencyError, ModelError
from medray.predict.onnx_runtime import first_line, usable_cpus
from medray.predict.predictor import Floats

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What OpenVINO computes in where the file's types leave it open. Said in every case: by itself it takes bf16 wherever
the CPU has it. In an int8 file the layers between quantised ones stay fp32."""


@cache
def _core() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingDependencyError("openvino", "the OpenVINO runtime", "pip install openvino") from None
    return openvino.Core()


def openvino_has_bf16() -> bool:
    """Whether OpenVINO has bf16 kernels for this CPU; elsewhere it would silently compute in fp32.

    Raises:
        MissingDependencyError: openvino is not installed.
    """
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoPredictor:
    """An ONNX file in OpenVINO, on the CPU. May be called from several threads: each has its own request.

    Args:
        path: the ``.onnx`` file: one float32 input (B, C, *s), one output.
        threads: of one inference; None for all CPUs that this process may use, never the machine's count.
        precision: fp32; bf16 (an error where this CPU has none); int8 for a file with quantised layers.

    Raises:
        ModelError: a precision that isn't to be had here.
        BundleError: the file is missing or not a model that OpenVINO loads.
        MissingDependencyError: openvino is not installed.
    """

    name = "openvino"

    def __init__(self, path: Path | str, *, threads: int | None = None, precision: str = "fp32") -> None:
        core = _core()
        if threads is not None and threads < 1:
            raise ModelError(f"threads={threads}: OpenVINO needs at least 1; leave it out for all usable CPUs")
        if precision not in _HINTS:
            raise ModelError(f"OpenVINO on a CPU computes in {', '.join(_HINTS)}, not {precision}. Choose one of these")
        if precision == "bf16" and not openvino_has_bf16():
            raise ModelError("this CPU has no bfloat16 for OpenVINO (AVX-512-BF16 or AMX). Use precision=fp32")
        if not Path(path).is_file():
            raise BundleError(f"{path}: no such ONNX file. Write the bundle anew, or use runtime=torch")
        self.threads, self.precision = threads or usable_cpus(), precision
        options = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,  # all threads on one batch: several requests at once are the server's replicas' affair
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # pinned threads of several processes would share one core
        }
        try:
            self._compiled: Any = core.compile_model(core.read_model(str(path)), "CPU", options)
        except Exception as error:
            raise BundleError(f"{path}: OpenVINO can't load it ({first_line(error)})") from error
        shape = self._compiled.input(0).get_partial_shape()
        self._axes = tuple(axis.get_length() if axis.is_static else None for axis in shape)
        self._local = threading.local()

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) float32 to logits (B, K[, *s]) float32.

        Raises:
            ModelError: the shape isn't one that the model takes.
        """
        # By itself it computes something of an image with too many channels, now and then.
        if batch.ndim != len(self._axes) or any(
            want is not None and want != have for want, have in zip(self._axes, batch.shape, strict=True)
        ):
            raise ModelError(f"OpenVINO refuses a batch of shape {batch.shape}: the model takes {self._axes}")
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        try:
            found = request.infer({0: np.ascontiguousarray(batch, dtype=np.float32)})
        except Exception as error:
            raise ModelError(f"OpenVINO refuses a batch of shape {batch.shape}: {first_line(error)}") from error
        # A copy: the request's own memory is written over by the next call.
        return np.array(found[0], dtype=np.float32)
