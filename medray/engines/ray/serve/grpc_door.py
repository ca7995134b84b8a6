"""gRPC for the Open Inference Protocol: a door beside HTTP, which asks the HTTP server on this machine.

Ray Serve's own gRPC proxy isn't used: as of Ray 2.60 it listens on all interfaces whatever the host is, has no TLS,
takes messages of 2 GiB, and tells anybody the applications' names. Here it is the server's own host, certificate and
limits. A key is looked at before a byte of a tensor is read; then the request goes, with its key, to the HTTP server,
which is where scopes, rates, admission and the audit trail are, once for both.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from medray import logs
from medray.config.serving import NAME, ServeConfig
from medray.engines.ray.serve.grpc_messages import SERVICE, message
from medray.engines.ray.serve.keys import KeyRing, from_headers
from medray.engines.ray.serve.protocol import HEADER
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import ServingError

_MOST_MESSAGE = (2 << 30) - (1 << 20)
"""Bytes: protocol buffers end at 2 GiB."""
_MOST_AT_ONCE = 64
_MOST_BYTES = 2 << 30
"""Of the messages of all inferences under way."""
_OTHERS = 8  # threads for what isn't inference: health is answered under load
_READING = 4  # of those, at most so many for methods that read a message
_MOST_NAMED = 16 << 10
"""Bytes of a message that only names a model."""
_SOON = 5.0
"""Seconds that whatever isn't inference may take: its message to arrive, the HTTP server to answer."""
_POLL = 0.5
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.UNAVAILABLE,
}
_CONTENTS = {
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
}
"""Where a tensor's numbers stand that aren't sent raw, and how they lie as bytes."""

Requests = Iterator[bytes]


@contextlib.contextmanager
def opened(config: ServeConfig) -> Iterator[str]:
    """Answer over gRPC on ``config.grpc_port`` while the block runs.

    Args:
        config: of the server, whose HTTP side answers by now.

    Yields:
        The address, such as ``127.0.0.1:9000``.

    Raises:
        ServingError: the port is taken, or the keys can't be used.
    """
    door, over = _Door(config), threading.Event()
    address = f"{_bracketed(config.host)}:{config.grpc_port}"
    slots = door.slots + _OTHERS
    executor = ThreadPoolExecutor(slots, thread_name_prefix="grpc")
    server = grpc.server(
        executor,
        maximum_concurrent_rpcs=slots + _MOST_AT_ONCE,
        options=[
            ("grpc.so_reuseport", 0),  # else a second server would share the port in silence
            ("grpc.max_receive_message_length", min(config.limits.body_mb << 20, _MOST_MESSAGE)),
            ("grpc.max_send_message_length", _MOST_MESSAGE),
            # The bound above is of a message as it came; one that is packed is refused rather than unpacked.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.max_connection_idle_ms", 300_000),
        ],
    )
    # Each takes a stream of one message, which on the wire is the same: so a handler runs before the message is read.
    handlers = {
        name: grpc.stream_unary_rpc_method_handler(door.told(name, method)) for name, method in door.methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # its tracebacks may quote what a client sent
    try:
        security = config.security
        if security.certificate is None or security.private_key is None:
            bound = server.add_insecure_port(address)
        else:
            pair = (Path(security.private_key).read_bytes(), Path(security.certificate).read_bytes())
            bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        if not bound:
            raise RuntimeError("the port can't be bound")
    except (RuntimeError, OSError) as error:
        executor.shutdown(wait=False)
        raise ServingError(f"can't listen on {address} ({str(error)[:200]}). Set grpc_port to another one") from None
    server.start()
    threading.Thread(target=door.follow, args=(over,), name="grpc-keys", daemon=True).start()
    try:
        yield address
    finally:
        over.set()
        server.stop(config.limits.answer_seconds).wait()
        executor.shutdown(wait=False)


class _Door:
    """What each method does."""

    def __init__(self, config: ServeConfig) -> None:
        self._limits = config.limits
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
        self._place = (host, config.port)
        self._tls: ssl.SSLContext | None = None
        if config.security.certificate is not None:
            self._tls = ssl.create_default_context(cafile=config.security.certificate)
            self._tls.check_hostname = False  # it is our own server, known by the very certificate
            self._tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        keys = config.security.keys
        self._ring = KeyRing(
            None if keys is None else Path(keys), lambda text: logs.event("keys-refused", level="error", text=text)
        )
        self.slots = min(_MOST_AT_ONCE, config.limits.waiting * config.replicas.most)
        self._free = threading.BoundedSemaphore(self.slots)
        self._reading = threading.BoundedSemaphore(_READING)
        self._most_body = min(config.limits.body_mb << 20, _MOST_MESSAGE)
        self._room = Room(max(_MOST_BYTES, self._most_body))
        self.methods: dict[str, Callable[[Requests, Any], Any]] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._describe,
            "ModelInfer": self._infer,
        }

    def follow(self, over: threading.Event) -> None:
        """Look at the file of keys, until it is over."""
        while not over.wait(_POLL):
            with contextlib.suppress(OSError):  # the next look may do better
                self._ring.refresh()

    def told(self, name: str, method: Callable[[Requests, Any], Any]) -> Callable[[Requests, Any], bytes]:
        """The method as gRPC calls it: its answer as bytes, its refusals as a status."""

        def handler(requests: Requests, context: Any) -> bytes:
            try:
                answer: bytes = method(requests, context).SerializeToString()
                return answer
            except RefusedError as error:
                _abort(context, error)
            except Exception as error:
                if not context.is_active():  # it was cancelled, or timed out: nobody hears an answer
                    _abort(context, RefusedError(408, "too-long", "the request did not arrive in time"))
                logs.event("defect", level="error", error=type(error).__name__, route=f"grpc {name}")
                _abort(context, RefusedError(500, "defect", "the server met a defect of its own; its log says where"))

        return handler

    # Methods --------------------------------------------------------------------------------------------------------

    def _live(self, _: Requests, __: Any) -> Any:
        return message("ServerLiveResponse")(live=self._is_well("/v2/health/live"))

    def _ready(self, _: Requests, __: Any) -> Any:
        return message("ServerReadyResponse")(ready=self._is_well("/v2/health/ready"))

    def _server(self, _: Requests, __: Any) -> Any:
        found = json.loads(self._ask("GET", "/v2", None)[1])
        # The extensions are of HTTP.
        return message("ServerMetadataResponse")(name=found["name"], version=found["version"])

    def _model_ready(self, requests: Requests, context: Any) -> Any:
        self._key(context)  # over HTTP this is open; here a message is read for it
        asked = self._named("ModelReadyRequest", requests, context)
        return message("ModelReadyResponse")(ready=self._is_well(f"{_path(asked.name, asked.version)}/ready"))

    def _describe(self, requests: Requests, context: Any) -> Any:
        key = self._key(context)
        asked = self._named("ModelMetadataRequest", requests, context)
        found = json.loads(self._ask("GET", _path(asked.name, asked.version), key)[1])
        return message("ModelMetadataResponse")(**found)

    def _infer(self, requests: Requests, context: Any) -> Any:
        key = self._key(context)
        if not self._free.acquire(blocking=False):
            raise RefusedError(429, "busy", f"{self.slots} inferences are under way over gRPC", retry_after=1)
        try:
            with self._room.taken(self._most_body, _SOON) as keep:
                content = self._content("ModelInferRequest", requests, context, self._limits.body_seconds)
                keep(len(content))
                asked = _parsed("ModelInferRequest", content)
                del content
                path = f"{_path(asked.model_name, asked.model_version)}/infer"
                body, length = _as_http(asked)
                del asked
                limit = self._limits.answer_seconds + self._limits.body_seconds
                headers, answer = self._ask("POST", path, key, body, {HEADER: str(length)}, limit=limit)
                return _from_http(answer, int(headers[HEADER]))
        finally:
            self._free.release()

    # What they share ------------------------------------------------------------------------------------------------

    def _key(self, context: Any) -> str | None:
        """The key that was sent, once it is known to be good for predictions."""
        sent = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
        text = from_headers(sent.get("authorization"), sent.get("x-api-key"))
        self._ring.who(text, "predict")
        return None if self._ring.is_open else text

    def _named(self, name: str, requests: Requests, context: Any) -> Any:
        """The message of a call that only names a model."""
        if not self._reading.acquire(blocking=False):
            raise RefusedError(429, "busy", f"{_READING} such calls are under way over gRPC", retry_after=1)
        try:
            content = self._content(name, requests, context, min(_SOON, self._limits.body_seconds))
        finally:
            self._reading.release()
        if len(content) > _MOST_NAMED:
            raise RefusedError(413, "too-large", f"a {name} is at most {_MOST_NAMED} bytes")
        return _parsed(name, content)

    def _content(self, name: str, requests: Requests, context: Any, seconds: float) -> bytes:
        """The one message of a call, in the time that it may take to arrive."""
        late = threading.Timer(seconds, context.cancel)
        late.daemon = True
        late.start()
        try:
            content = next(requests, None)
        finally:
            late.cancel()
        if content is None:
            raise RefusedError(400, "bad-request", f"the call brings no {name}")
        return content

    def _is_well(self, path: str) -> bool:
        try:
            self._ask("GET", path, None)
        except RefusedError as error:
            if error.status in (404, 422, 502, 503, 504):
                return False
            raise
        return True

    def _ask(
        self,
        method: str,
        path: str,
        key: str | None,
        body: bytes | None = None,
        more: Mapping[str, str] | None = None,
        *,
        limit: float | None = None,
    ) -> tuple[http.client.HTTPMessage, bytes]:
        """What the HTTP server answers within ``limit`` seconds; None for few.

        Raises:
            RefusedError: it refuses, or doesn't answer.
        """
        headers = {**(more or {}), **({} if key is None else {"X-API-Key": key})}
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        limit = _SOON if limit is None else limit
        connection = (
            http.client.HTTPConnection(*self._place, timeout=limit)
            if self._tls is None
            else http.client.HTTPSConnection(*self._place, timeout=limit, context=self._tls)
        )
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except TimeoutError:
            raise RefusedError(503, "too-long", f"no answer within {limit:g} s", retry_after=10) from None
        except (OSError, http.client.HTTPException):
            raise RefusedError(503, "not-ready", "the server does not answer just now", retry_after=1) from None
        finally:
            connection.close()
        if answer.status == 200:
            return answer.headers, content
        after = answer.headers.get("Retry-After", "")
        raise RefusedError(
            answer.status, "refused", _error_of(content), retry_after=int(after) if after.isdigit() else None
        )


class Room:
    """Bytes that several may hold at once, so many in all.

    Args:
        most: in all.
    """

    def __init__(self, most: int) -> None:
        self._left, self._changed = most, threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int, seconds: float) -> Iterator[Callable[[int], None]]:
        """Hold ``count`` bytes, once there is room for them.

        Yields:
            Told how many of them are needed after all, it gives the others back.

        Raises:
            RefusedError: there is no room within ``seconds``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._left >= count, seconds):
                raise RefusedError(429, "busy", "the messages under way over gRPC take all room", retry_after=1)
            self._left -= count
        held = count

        def keep(needed: int) -> None:
            nonlocal held
            with self._changed:
                self._left += held - needed
                held = needed
                self._changed.notify_all()

        try:
            yield keep
        finally:
            keep(0)


def _parsed(name: str, content: bytes) -> Any:
    try:
        return message(name).FromString(content)
    except DecodeError:
        raise RefusedError(400, "bad-request", f"the message is no {name}") from None


def _abort(context: Any, error: RefusedError) -> NoReturn:
    if error.retry_after is not None:
        context.set_trailing_metadata((("retry-after", str(error.retry_after)),))
    context.abort(_STATUS.get(error.status, grpc.StatusCode.INTERNAL), error.message)
    raise AssertionError("abort raises")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _path(model: str, version: str) -> str:
    # Quoting would not do: a quoted slash is unquoted before the route is chosen.
    if not re.fullmatch(NAME, model) or (version and not re.fullmatch(NAME, version)):
        raise RefusedError(400, "bad-request", f"names of models and versions match {NAME}")
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")


def _error_of(content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return "the server refuses"
    return str(error if isinstance(error, str) else error.get("message", ""))[:1000]


def _as_http(asked: Any) -> tuple[bytes, int]:
    """An inference request as the binary extension has it: JSON, then the tensors; and the JSON's length.

    Raises:
        RefusedError: contents and tensors don't pair, or aren't what the datatype says.
    """
    raw = list(asked.raw_input_contents)
    if raw and (len(raw) != len(asked.inputs) or any(one.HasField("contents") for one in asked.inputs)):
        raise RefusedError(
            400, "bad-request", "raw_input_contents must hold one entry for each input, without contents"
        )
    inputs = []
    for index, one in enumerate(asked.inputs):
        if not raw or index >= len(raw):
            raw.append(_packed(one))
        size = {"binary_data_size": len(raw[index])}
        inputs.append({"name": one.name, "datatype": one.datatype, "shape": list(one.shape), "parameters": size})
    outputs = [{"name": one.name, "parameters": {"binary_data": True}} for one in asked.outputs]
    document = {"inputs": inputs, "outputs": outputs, "parameters": {"binary_data_output": True}}
    if asked.id:
        document["id"] = asked.id
    text = json.dumps(document).encode()
    return b"".join([text, *raw]), len(text)


def _packed(tensor: Any) -> bytes:
    """Numbers that weren't sent raw, as bytes."""
    if tensor.datatype not in _CONTENTS:
        names = ", ".join(_CONTENTS)
        raise RefusedError(400, "bad-request", f"send raw_input_contents, or contents of a datatype among {names}")
    field, layout = _CONTENTS[tensor.datatype]
    wide = np.asarray(getattr(tensor.contents, field))
    with np.errstate(over="ignore"):
        narrow = wide.astype(layout)
    if narrow.dtype.kind in "iu" and not np.array_equal(wide, narrow):
        raise RefusedError(400, "bad-request", f"{field} holds numbers that are no {tensor.datatype}")
    return narrow.tobytes()


def _from_http(body: bytes, length: int) -> Any:
    """The answer, whose outputs are all binary."""
    document, view = json.loads(body[:length]), memoryview(body)[length:]
    answer = message("ModelInferResponse")(
        model_name=document["model_name"], model_version=document["model_version"], id=document.get("id", "")
    )
    for name, value in document["parameters"].items():
        answer.parameters[name].string_param = str(value)
    at = 0
    for one in document["outputs"]:
        answer.outputs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        size = one["parameters"]["binary_data_size"]
        answer.raw_output_contents.append(bytes(view[at : at + size]))
        at += size
    if answer.ByteSize() > _MOST_MESSAGE:
        raise RefusedError(413, "too-large", "the answer exceeds one message of 2 GiB. Send fewer at once, or use HTTP")
    return answer
