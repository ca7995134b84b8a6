"""Post-training quantisation of an ONNX file to int8, by ONNX Runtime's quantiser.

Static: unsigned 8-bit activations and signed 8-bit weights per channel, which is what x86's VNNI multiplies, written
as Q/DQ nodes, which both ONNX Runtime and OpenVINO run. Normalisations, softmax and the like stay fp32. Dynamic: the
weights of linear layers alone; activations are scaled as they come (on convolutions that is slower than fp32).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from medray.errors import CompressionError
from medray.predict.predictor import Floats

STATIC = (
    "Conv",
    "ConvTranspose",
    "MatMul",
    "Gemm",
    "Add",
    "Mul",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
)
"""Kinds of nodes that are quantised statically: what multiplies, and what lies between without leaving int8."""
LINEAR = ("MatMul", "Gemm")
LINEAR_SHARE = 0.5
"""Of all weights that must lie in linear layers for dynamic quantisation to make sense."""


class _Reader:
    """Calibration cases as the quantiser asks for them: one by one, then None."""

    def __init__(self, name: str, cases: Iterable[Floats]) -> None:
        self._name, self._cases = name, iter(cases)
        self.count = 0

    def get_next(self) -> dict[str, Any] | None:
        case = next(self._cases, None)
        if case is None:
            return None
        self.count += 1
        return {self._name: np.ascontiguousarray(case, dtype=np.float32)}


def quantize_static(source: Path, target: Path, cases: Iterable[Floats]) -> int:
    """Write ``target``: ``source`` in int8, its ranges taken from ``cases``.

    Args:
        source: an fp32 ``.onnx`` file with one input.
        target: the new file.
        cases: batches (B, C, *s) as the network will see them, of training data.

    Returns:
        How many cases were looked at.

    Raises:
        CompressionError: no case, nothing to quantise, or the quantiser gives up.
    """
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantise

    reader = _Reader(_input_of(source), cases)
    with _prepared(source) as ready:
        try:
            with _quiet():
                quantise(
                    str(ready),
                    str(target),
                    reader,
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(STATIC),
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                )
        except Exception as error:
            if not reader.count:
                raise CompressionError("static quantisation got no calibration case. Give training data") from error
            raise CompressionError(f"{source}: ONNX Runtime can't quantise it ({_first(error)})") from error
    _require(target, source, "QuantizeLinear")
    return reader.count


def quantize_dynamic(source: Path, target: Path) -> None:
    """Write ``target``: ``source`` with the weights of its linear layers in int8.

    Raises:
        CompressionError: a network of convolutions, on which it would be slower than fp32, or the quantiser gives up.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantise

    with _prepared(source) as ready:
        share = linear_share(ready)
        if share < LINEAR_SHARE:
            raise CompressionError(
                f"{source}: {share:.0%} of the weights lie in linear layers; dynamic quantisation helps from "
                f"{LINEAR_SHARE:.0%} on and makes convolutions slower. Use --quantize int8"
            )
        try:
            with _quiet():
                quantise(
                    str(ready),
                    str(target),
                    op_types_to_quantize=list(LINEAR),
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                )
        except Exception as error:
            raise CompressionError(f"{source}: ONNX Runtime can't quantise it ({_first(error)})") from error
    _require(target, source, "MatMulInteger")


def linear_share(path: Path) -> float:
    """Share of the weights of an ONNX file that linear layers multiply by."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    linear = {name for node in graph.node if node.op_type in LINEAR for name in node.input} & set(sizes)
    return sum(sizes[name] for name in linear) / max(1, sum(sizes.values()))


def _input_of(path: Path) -> str:
    import onnx

    return str(onnx.load(str(path), load_external_data=False).graph.input[0].name)


@contextmanager
def _prepared(source: Path) -> Iterator[Path]:
    """The file with shapes inferred and batch norms folded, as the quantiser wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="medray-quantise-") as folder:
        ready = Path(folder) / "prepared.onnx"
        for symbolic in (True, False):  # symbolic inference doesn't know every operator
            try:
                with _quiet():
                    quant_pre_process(str(source), str(ready), skip_symbolic_shape=not symbolic)
                break
            except Exception as error:
                if not symbolic:
                    raise CompressionError(f"{source}: can't be prepared for int8 ({_first(error)})") from error
        yield ready


def _require(target: Path, source: Path, node: str) -> None:
    import onnx

    kinds = {each.op_type for each in onnx.load(str(target), load_external_data=False).graph.node}
    if node not in kinds:
        raise CompressionError(f"{source}: has no layer that could be quantised; nothing was gained")


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser logs advice to whoever writes such code, on the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
