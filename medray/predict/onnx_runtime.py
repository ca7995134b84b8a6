"""The ONNX Runtime runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medray.errors import BundleError, MissingDependencyError, ModelError
from medray.predict.predictor import Floats

Provider = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def usable_cpus() -> int:
    """CPUs that this process may use (its affinity mask, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxPredictor:
    """An ONNX file in ONNX Runtime.

    Args:
        path: the ``.onnx`` file: one float32 input (B, C, *s), one output.
        threads: intra-op threads; None for all CPUs that this process may use. Never left to the library, whose default
            counts the machine's cores and so oversubscribes containers and concurrent trials. Spinning is off: idle
            threads that burn CPU slow whatever shares the machine.
        provider: cpu, or cuda (an error where it is not there, never a silent fall-back).
        precision: of the arithmetic inside the file, for the record (fp32, int8).

    Raises:
        ModelError: the provider is not available here.
        BundleError: the file is missing or not a model that ONNX Runtime loads.
        MissingDependencyError: onnxruntime is not installed.
    """

    name = "onnx"

    def __init__(
        self, path: Path | str, *, threads: int | None = None, provider: Provider = "cpu", precision: str = "fp32"
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingDependencyError(
                "onnxruntime", "the ONNX runtime", "pip install onnxruntime-gpu (it runs on CPU as well)"
            ) from None
        if threads is not None and threads < 1:
            raise ModelError(f"threads={threads}: ONNX Runtime needs at least 1; leave it out for all usable CPUs")
        wanted = _PROVIDERS.get(provider)
        if wanted is None or wanted not in ort.get_available_providers():
            raise ModelError(f"ONNX Runtime here has no provider {provider!r}. Use provider=cpu")
        if not Path(path).is_file():
            raise BundleError(f"{path}: no such ONNX file. Write the bundle anew, or use runtime=torch")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cpus()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # warnings about unused initialisers tell a user nothing
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=[wanted])
        except Exception as error:
            raise BundleError(f"{path}: ONNX Runtime can't load it ({first_line(error)})") from error
        if provider != "cpu" and self._session.get_providers()[0] != wanted:
            raise ModelError(
                f"ONNX Runtime could not start {wanted} and fell back. Check the driver, or use provider=cpu"
            )
        self._input: str = self._session.get_inputs()[0].name
        self.threads: int = options.intra_op_num_threads
        self.precision = precision

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) float32 to logits (B, K[, *s]) float32.

        Raises:
            ModelError: the shape isn't one that the model takes.
        """
        try:
            (logits,) = self._session.run(None, {self._input: np.ascontiguousarray(batch, dtype=np.float32)})
        except Exception as error:
            raise ModelError(f"ONNX Runtime refuses a batch of shape {batch.shape}: {first_line(error)}") from error
        return np.asarray(logits, dtype=np.float32)


def first_line(error: BaseException) -> str:
    """Of an engine's complaint, what a user may read."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
