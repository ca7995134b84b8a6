"""The messages of the Open Inference Protocol, version 2, over gRPC.

https://github.com/kserve/open-inference-protocol, specification/protocol/open_inference_grpc.proto, of which these are
the fields and their numbers. They are put together here, in a pool of their own: no compiler has to run when a package
is built, and a client of the same protocol (Triton's) in the same process brings messages of the same names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_SCALARS = ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
_TENSOR = ("name:string", "datatype:string", "shape:int64*", "parameters:map", "contents:InferTensorContents")
_MESSAGES: dict[str, tuple[str, ...]] = {
    "InferParameter": (
        "bool_param:bool|", "int64_param:int64|", "string_param:string|", "double_param:double|",
        "uint64_param:uint64|",
    ),
    "InferTensorContents": (
        "bool_contents:bool*", "int_contents:int32*", "int64_contents:int64*", "uint_contents:uint32*",
        "uint64_contents:uint64*", "fp32_contents:float*", "fp64_contents:double*", "bytes_contents:bytes*",
    ),
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live:bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready:bool",),
    "ModelReadyRequest": ("name:string", "version:string"),
    "ModelReadyResponse": ("ready:bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name:string", "version:string", "extensions:string*"),
    "ModelMetadataRequest": ("name:string", "version:string"),
    "ModelMetadataResponse": (
        "name:string", "versions:string*", "platform:string", "inputs:ModelMetadataResponse.TensorMetadata*",
        "outputs:ModelMetadataResponse.TensorMetadata*",
    ),
    "ModelMetadataResponse.TensorMetadata": ("name:string", "datatype:string", "shape:int64*"),
    "ModelInferRequest": (
        "model_name:string", "model_version:string", "id:string", "parameters:map",
        "inputs:ModelInferRequest.InferInputTensor*", "outputs:ModelInferRequest.InferRequestedOutputTensor*",
        "raw_input_contents:bytes*",
    ),
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": ("name:string", "parameters:map"),
    "ModelInferResponse": (
        "model_name:string", "model_version:string", "id:string", "parameters:map",
        "outputs:ModelInferResponse.InferOutputTensor*", "raw_output_contents:bytes*",
    ),
    "ModelInferResponse.InferOutputTensor": _TENSOR,
}  # fmt: skip
"""Fields in the order of their numbers, from 1: ``name:type``, then * for many, | for one of several."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="medray/open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for path, fields in _MESSAGES.items():
        parent, _, name = path.rpartition(".")
        message = made[path] = (made[parent].nested_type if parent else file.message_type).add(name=name)
        for number, text in enumerate(fields, 1):
            field, _, kind = text.partition(":")
            _add(message, path, field, kind, number)
    return file


def _add(message: Any, path: str, name: str, kind: str, number: int) -> None:
    known = descriptor_pb2.FieldDescriptorProto
    many = kind.endswith("*") or kind == "map"
    field = message.field.add(name=name, number=number, label=known.LABEL_REPEATED if many else known.LABEL_OPTIONAL)
    plain = kind.rstrip("*|")
    if kind.endswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if plain in _SCALARS:
        field.type = getattr(known, f"TYPE_{plain.upper()}")
        return
    field.type = known.TYPE_MESSAGE
    if kind != "map":
        field.type_name = f".{PACKAGE}.{plain}"
        return
    # What map<string, InferParameter> stands for on the wire.
    entry = message.nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    _add(entry, path, "key", "string", 1)
    _add(entry, path, "value", "InferParameter", 2)
    field.type_name = f".{PACKAGE}.{path}.ParametersEntry"


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())  # type: ignore[no-untyped-call]


def message(name: str) -> Any:
    """The class of a message, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))  # type: ignore[no-untyped-call]
