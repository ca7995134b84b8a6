"""The Open Inference Protocol: requests understood, and refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medray.engines.ray.serve import protocol
from medray.engines.ray.serve.refusal import RefusedError
from medray.tasks.catalogue import find_task

SPEC: Any = SimpleNamespace(
    kind="classification",
    task=find_task("classification"),
    outputs=2,
    ndim=2,
    channels=1,
    classes=("a", "b"),
    inference=SimpleNamespace(patch_size=None),
    preprocess=SimpleNamespace(size=(2, 3)),
)
MOST = 1 << 20
ARRAY = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)


def request(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 2, 3], "data": ARRAY.ravel().tolist()}
    return {"id": "7", "inputs": [{**tensor, **changes}]}


def test_json_and_binary_say_the_same() -> None:
    plain = protocol.parse(json.dumps(request()).encode(), None, SPEC, MOST)
    assert np.array_equal(plain.array, ARRAY) and plain.outputs == {"logits": False, "probabilities": False}
    head = request(parameters={"binary_data_size": 24})
    del head["inputs"][0]["data"]
    head["outputs"] = [{"name": "logits", "parameters": {"binary_data": True}}]
    text = json.dumps(head).encode()
    binary = protocol.parse(text + ARRAY.tobytes(), str(len(text)), SPEC, MOST)
    assert np.array_equal(binary.array, ARRAY) and binary.outputs == {"logits": True}
    logits = np.array([[1.5, -2.0]], np.float32)
    body, headers = protocol.answer(binary, {"logits": logits}, name="m", version="1", parameters={})
    cut = int(headers[protocol.HEADER])
    assert json.loads(body[:cut])["id"] == "7" and np.array_equal(np.frombuffer(body[cut:], "<f4"), logits[0])


def test_nested_data_and_other_types() -> None:
    whole = protocol.parse(json.dumps(request(data=ARRAY.tolist(), datatype="UINT8")).encode(), None, SPEC, MOST)
    assert whole.array.dtype == np.float32 and np.array_equal(whole.array, ARRAY)


@pytest.mark.parametrize(
    ("body", "length", "status"),
    [
        (b"{", None, 400),
        (b"[" * 100_000, None, 400),
        (b"[]", None, 400),
        (b"{}", "99", 400),
        (b"{}", "-1", 400),
        ({"inputs": []}, None, 400),
        (request(name="x"), None, 400),
        (request(datatype="BYTES"), None, 400),
        (request(datatype=[]), None, 400),
        (request(shape=[1, 1, 2, "3"]), None, 400),
        (request(shape=[2**30, 2**30]), None, 413),
        (request(data=[1, 2]), None, 400),
        (request(data=["a"] * 6), None, 400),
        (request(data=[[1], [2, 3]]), None, 400),
        (request(data=None), None, 400),
        (request(shape=[1, 2, 3]), None, 422),
        (request(shape=[0, 1, 2, 3], data=[]), None, 422),
        (request(data=[float("nan")] * 6), None, 422),
        (request(data=[1e300] * 6), None, 422),
        ({**request(), "outputs": [{"name": "x"}]}, None, 400),
        ({**request(), "outputs": [{"name": []}]}, None, 400),
        ({**request(), "parameters": 3}, None, 400),
        ({**request(), "id": 3}, None, 400),
        (request(parameters={"binary_data_size": 24}), None, 400),
        (request(parameters={"binary_data_size": "24"}), None, 400),
    ],
)
def test_what_is_wrong_is_refused(body: Any, length: str | None, status: int) -> None:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RefusedError) as refused:
        protocol.parse(text, length, SPEC, MOST)
    assert refused.value.status == status


def test_logits_may_be_fewer_than_probabilities() -> None:
    spec: Any = SimpleNamespace(**{**vars(SPEC), "task": find_task("ordinal"), "outputs": 1})
    shapes = {row["name"]: row["shape"] for row in protocol.describe(spec, "m", ["1"])["outputs"]}
    assert shapes == {"logits": [-1, 1], "probabilities": [-1, 2]}


def test_what_would_be_too_large_is_refused_before_an_array_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SimpleNamespace(
        **{**vars(SPEC), "task": find_task("segmentation"), "preprocess": SimpleNamespace(size=None)}
    )
    head = request(shape=[1, 1, 100, 100])

    def status(most: int, **changes: Any) -> int:
        with pytest.raises(RefusedError) as refused:
            protocol.parse(json.dumps({**head, **changes}).encode(), None, spec, most)
        return refused.value.status

    assert status(79_999) == 413  # 4 bytes, 10,000 values, 2 classes
    assert status(80_000) == 400  # its six numbers are looked at
    monkeypatch.setattr(protocol, "_MOST_VALUES", 19_999)
    assert status(80_000) == 413
    assert status(80_000, parameters={"binary_data_output": True}) == 400
