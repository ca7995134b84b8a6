"""The Open Inference Protocol, version 2, over HTTP: JSON, and its binary tensor extension.

https://github.com/kserve/open-inference-protocol, and Triton's protocol/extension_binary_data.md. A model's one input,
``image``, is the array that the network sees, prepared (B, C, *s); its outputs are ``logits`` and ``probabilities``.

Legend: B batch, C channels, K classes, *s spatial.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.bundle.spec import BundleSpec
from medray.engines.ray.serve.refusal import RefusedError
from medray.predict.predictor import Floats

HEADER = "Inference-Header-Content-Length"
INPUT = "image"
OUTPUTS = ("logits", "probabilities")
_TYPES = {
    "FP32": np.float32,
    "FP64": np.float64,
    "FP16": np.float16,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "UINT16": np.uint16,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
}
_MOST_JSON = 64 << 20
_MOST_VALUES = _MOST_JSON // 8


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A request, understood.

    Attributes:
        id: of the client, told back.
        array: (B, C, *s).
        outputs: names wanted, and whether each is wanted as bytes.
    """

    id: str | None
    array: Floats
    outputs: Mapping[str, bool]


def describe(spec: BundleSpec, name: str, versions: list[str]) -> dict[str, Any]:
    """The model's metadata."""
    spatial = list(spec.inference.patch_size or spec.preprocess.size or (-1,) * spec.ndim)
    channels = {"logits": spec.outputs, "probabilities": len(spec.classes)}
    where = spatial if spec.task.dense else []
    return {
        "name": name,
        "versions": versions,
        "platform": "medray",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, spec.channels, *spatial]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, channels[name], *where]} for name in OUTPUTS],
    }


def parse(body: bytes, header_length: str | None, spec: BundleSpec, most: int) -> InferRequest:
    """Understand an inference request.

    Args:
        body: all of it.
        header_length: value of the header that says where the binary tensors begin; None: all is JSON.
        spec: of the model.
        most: bytes that the tensor, and what is answered, may take as float32.

    Raises:
        RefusedError: 400, against the protocol; 413, too large; 422, a tensor that the model doesn't take.
    """
    cut = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length) > len(body):
            raise _bad(f"{HEADER} must be a number of at most {len(body)}, the body's length")
        cut = int(header_length)
    if cut > _MOST_JSON:
        raise _bad(f"{cut:,} bytes of JSON; send tensors of that size by the binary extension")
    try:
        request = json.loads(body[:cut])
    except (ValueError, RecursionError):
        raise _bad("the body is no JSON") from None
    if not isinstance(request, dict):
        raise _bad("the body must be a JSON object")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad(f"inputs must be a list of one tensor, {INPUT!r}")
    count = _count(inputs[0])
    segments = spec.task.dense
    bytes_ = 4 * count * (max(1, len(spec.classes)) if segments else 1)
    if bytes_ > most:
        raise RefusedError(
            413,
            "too-large",
            f"the tensor, or its answer, is of {bytes_:,} bytes; this server takes {most:,} (limits.unpacked_mb). Send "
            "fewer at once",
        )
    outputs = _outputs(request)
    if segments and not all(outputs.values()) and bytes_ // 4 > _MOST_VALUES:
        raise RefusedError(
            413,
            "too-large",
            f"{bytes_ // 4:,} values as JSON; ask for outputs with binary_data: {_MOST_VALUES:,} are given",
        )
    array = _tensor(inputs[0], count, body[cut:])
    wanted = [-1, spec.channels, *(spec.inference.patch_size or spec.preprocess.size or (-1,) * spec.ndim)]
    fits = array.ndim == len(wanted) and all(w in (-1, n) for w, n in zip(wanted, array.shape, strict=True))
    if not fits or not array.size:
        raise RefusedError(422, "wrong-shape", f"the shape is {list(array.shape)}; the model takes {wanted} (-1: any)")
    with np.errstate(over="ignore", invalid="ignore"):
        floats = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(floats).all():
        raise RefusedError(422, "not-finite", f"{INPUT} holds NaN or infinite values")
    identity = request.get("id")
    if identity is not None and not isinstance(identity, str):
        raise _bad("id must be text")
    return InferRequest(id=identity, array=floats, outputs=outputs)


def _bad(message: str) -> RefusedError:
    return RefusedError(400, "bad-request", message)


def _outputs(request: Mapping[str, Any]) -> dict[str, bool]:
    parameters = request.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise _bad("parameters must be a JSON object")
    binary = parameters.get("binary_data_output") is True
    asked = request.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(OUTPUTS, binary)
    if not isinstance(asked, list) or not all(isinstance(one, dict) for one in asked):
        raise _bad("outputs must be a list of objects")
    found = {}
    for one in asked:
        name, own = one.get("name"), one.get("parameters") or {}
        if not isinstance(name, str) or name not in OUTPUTS or not isinstance(own, dict):
            raise _bad(f"an output is none of {', '.join(OUTPUTS)}")
        found[name] = own.get("binary_data", binary) is True
    return found


def _count(given: Mapping[str, Any]) -> int:
    """Values of the described tensor, before any array is made."""
    name, kind, shape = (given.get(key) for key in ("name", "datatype", "shape"))
    if name != INPUT:
        raise _bad(f"the input must be named {INPUT!r}")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise _bad(f"datatype must be one of {', '.join(_TYPES)}")
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 8
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in shape)
    ):
        raise _bad("shape must be a list of at most 8 whole numbers")
    return math.prod(shape)


def _tensor(given: Mapping[str, Any], count: int, binary: bytes) -> npt.NDArray[Any]:
    shape, parameters, dtype = given["shape"], given.get("parameters"), np.dtype(_TYPES[given["datatype"]])
    dtype = dtype.newbyteorder("<")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if size != count * dtype.itemsize or size != len(binary):
            raise _bad(
                f"binary_data_size must be that of the shape, {count * dtype.itemsize}, and of the bytes that follow "
                f"the JSON, {len(binary)}"
            )
        return np.frombuffer(binary, dtype=dtype).reshape(shape)
    if binary:
        raise _bad(f"{len(binary)} bytes follow the JSON, and no input says binary_data_size")
    data = given.get("data")
    if not isinstance(data, list):
        raise _bad("an input needs data, or binary_data_size and its bytes after the JSON")
    try:
        flat = np.asarray(data, dtype=np.float64).ravel()
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise _bad("data must be numbers, flat or nested as the shape") from None
    if flat.size != count:
        raise _bad(f"data has {flat.size} numbers, the shape {count}")
    return flat.reshape(shape)


def answer(
    request: InferRequest, outputs: Mapping[str, Floats], *, name: str, version: str, parameters: Mapping[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """The answer's body and headers.

    Args:
        request: that is answered.
        outputs: all that there are, by name.
        name, version: of the model.
        parameters: of the answer: the engine, its precision.
    """
    described, tail = [], []
    for output, binary in request.outputs.items():
        values = np.ascontiguousarray(outputs[output], dtype="<f4")
        row: dict[str, Any] = {"name": output, "datatype": "FP32", "shape": list(values.shape)}
        if binary:
            tail.append(values.tobytes())
            row["parameters"] = {"binary_data_size": values.nbytes}
        else:
            row["data"] = [float(f"{value:.7g}") for value in values.ravel().tolist()]
        described.append(row)
    document = {"model_name": name, "model_version": version, "parameters": dict(parameters), "outputs": described}
    if request.id is not None:
        document["id"] = request.id
    text = json.dumps(document).encode()
    if not tail:
        return text, {"Content-Type": "application/json"}
    return b"".join([text, *tail]), {"Content-Type": "application/octet-stream", HEADER: str(len(text))}
