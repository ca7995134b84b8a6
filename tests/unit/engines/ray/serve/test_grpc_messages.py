"""The messages against Triton's own, compiled from the protocol's file."""

from __future__ import annotations

from typing import Any

import pytest

from medray.engines.ray.serve.grpc_messages import _MESSAGES, message


def theirs() -> Any:
    pytest.importorskip("tritonclient.grpc")
    from tritonclient.grpc import service_pb2

    return service_pb2


def found(pool: Any, path: str) -> Any:
    first, _, rest = path.partition(".")
    known = pool.message_types_by_name[first]
    return known.nested_types_by_name[rest] if rest else known


@pytest.mark.parametrize("path", _MESSAGES)
def test_fields_are_the_protocol_s(path: str) -> None:
    ours, other = message(path).DESCRIPTOR, found(theirs().DESCRIPTOR, path)
    assert ours.full_name == other.full_name
    for field in ours.fields:
        twin = other.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (twin.number, twin.type, twin.is_repeated)
        if field.message_type is not None:
            assert field.message_type.full_name == twin.message_type.full_name


def test_bytes_of_one_are_understood_by_the_other() -> None:
    other = theirs().ModelInferRequest(model_name="m", model_version="2", id="7", raw_input_contents=[b"abc"])
    tensor = other.inputs.add(name="image", datatype="FP32", shape=[1, -1])
    tensor.parameters["a"].int64_param = -3
    tensor.contents.fp32_contents.extend([0.5, 2.0])
    ours = message("ModelInferRequest").FromString(other.SerializeToString())
    assert (ours.model_name, ours.model_version, ours.id, list(ours.raw_input_contents)) == ("m", "2", "7", [b"abc"])
    assert list(ours.inputs[0].shape) == [1, -1] and ours.inputs[0].parameters["a"].int64_param == -3
    assert list(ours.inputs[0].contents.fp32_contents) == [0.5, 2.0]
    answer = message("ModelInferResponse")(model_name="m", raw_output_contents=[b"xyz"])
    answer.parameters["engine"].string_param = "onnx"
    again = theirs().ModelInferResponse.FromString(answer.SerializeToString())
    assert again.parameters["engine"].string_param == "onnx" and list(again.raw_output_contents) == [b"xyz"]
