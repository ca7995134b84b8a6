"""gRPC in front of the real routes on a real port, asked by Triton's own client and by hostile ones."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from medray.config.serving import ServeConfig, check_serving
from medray.engines.ray.serve import grpc_door
from medray.engines.ray.serve.app import create_app
from medray.engines.ray.serve.grpc_messages import SERVICE, message
from medray.engines.ray.serve.keys import add_key, revoke_key
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import ConfigError, ServingError

triton = pytest.importorskip("tritonclient.grpc")
SHAPE = (2, 1, 16, 16)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Behind:
    """The routes on a port, gRPC beside them, and what both write down."""

    def __init__(self, config: ServeConfig, service: Any, key: str, address: str) -> None:
        self.config, self.service, self.key, self.address = config, service, key, address
        self.keys = Path(config.security.keys or "")

    @property
    def audit(self) -> list[dict[str, Any]]:
        path = Path(self.config.state) / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def call(self, name: str, request: Any, key: str | None = None, **how: Any) -> Any:
        with grpc.insecure_channel(self.address) as channel:
            ask = channel.unary_unary(f"/{SERVICE}/{name}")
            metadata = [] if key is None else [("authorization", f"Bearer {key}")]
            content = request if isinstance(request, bytes) else request.SerializeToString()
            answer = ask(content, metadata=metadata, timeout=60, **how)
            return message(f"{name}Response").FromString(answer)


@contextlib.contextmanager
def running(
    make_service: Callable[..., Any], bundles: dict[str, Path], folder: Path, **security: str
) -> Iterator[Behind]:
    """The routes of two models behind uvicorn, and the door before them."""
    key = add_key(folder / "keys.json", "clinic", ("predict",), requests_per_minute=100)
    models = {name: {"runtime": "torch", "versions": {"1": {"bundle": str(bundles[name])}}} for name in ("cls", "seg")}
    content = {
        "port": free_port(),
        "grpc_port": free_port(),
        "models": models,
        "limits": {"body_mb": 1, "body_seconds": 2, "waiting": 4},
        "security": {"keys": str(folder / "keys.json"), **security},
    }
    service = make_service(**content)
    config = check_serving({**content, "state": str(folder / "state")}, source="test", folder=folder)
    files = {"ssl_certfile": security.get("certificate"), "ssl_keyfile": security.get("private_key")}
    app = create_app(lambda: service)
    http = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=config.port, log_level="critical", **files))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        with grpc_door.opened(config) as address:
            yield Behind(config, service, key, address)
    finally:
        http.should_exit = True
        thread.join(30)


@pytest.fixture
def behind(make_service: Callable[..., Any], small_bundles: dict[str, Path], tmp_path: Path) -> Iterator[Behind]:
    with running(make_service, small_bundles, tmp_path) as made:
        yield made


def certificate(folder: Path) -> dict[str, str]:
    """Files of a certificate that signs itself, of a machine with another name than ours."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server.clinic.example")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("server.clinic.example")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    (folder / "server.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return {"certificate": str(folder / "server.pem"), "private_key": str(folder / "server.key")}


def tensor(raw: bool = True, **changes: Any) -> Any:
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    asked = message("ModelInferRequest")(model_name="cls", id="7")
    one = asked.inputs.add(name="image", datatype="FP32", shape=SHAPE)
    if raw:
        asked.raw_input_contents.append(array.tobytes())
    else:
        one.contents.fp32_contents.extend(array.ravel().tolist())
    for name, value in changes.items():
        setattr(asked, name, value)
    return asked


def refused(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


def test_triton_s_client_works_unmodified(behind: Behind) -> None:
    client = triton.InferenceServerClient(behind.address)
    headers = {"authorization": f"Bearer {behind.key}"}
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("cls", headers=headers) and not client.is_model_ready("none", headers=headers)
    assert client.get_server_metadata().name == "medray"
    about = client.get_model_metadata("seg", headers=headers)
    assert about.inputs[0].name == "image" and list(about.inputs[0].shape) == [-1, 1, 16, 16, 16]
    array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    given = triton.InferInput("image", list(SHAPE), "FP32")
    given.set_data_from_numpy(array)
    wanted = [triton.InferRequestedOutput("probabilities")]
    answer = client.infer("cls", [given], outputs=wanted, headers=headers, request_id="9", model_version="1")
    found = answer.as_numpy("probabilities")
    assert found.shape == (2, 2) and np.allclose(found.sum(1), 1, atol=1e-5) and answer.as_numpy("logits") is None
    assert answer.get_response().id == "9" and answer.get_response().parameters["engine"].string_param == "torch"
    (line,) = behind.audit
    assert line["what"] == "infer" and line["name"] == "clinic" and line["model"] == "cls"


def test_raw_and_typed_contents_say_the_same(behind: Behind) -> None:
    raw, typed = (behind.call("ModelInfer", tensor(raw), behind.key) for raw in (True, False))
    assert [one.name for one in raw.outputs] == ["logits", "probabilities"] and raw.id == "7"
    assert list(raw.raw_output_contents) == list(typed.raw_output_contents)
    assert list(raw.outputs[0].shape) == [2, 2] and len(raw.raw_output_contents[0]) == 16


def test_without_a_good_key_nothing_is_told_and_keys_change_while_it_runs(behind: Behind) -> None:
    describe, nothing = (message("ModelMetadataRequest")(name=name) for name in ("cls", "none"))
    for name, request in (
        ("ModelInfer", tensor()),
        ("ModelMetadata", describe),
        ("ModelReady", message("ModelReadyRequest")(name="cls")),
    ):
        for key in (None, "medray_000000000000_wrong"):
            assert refused(lambda r=request, n=name, k=key: behind.call(n, r, k)) == grpc.StatusCode.UNAUTHENTICATED
    metrics = add_key(behind.keys, "it", ("metrics",))
    assert behind.call("ServerLive", message("ServerLiveRequest")()).live
    revoke_key(behind.keys, "clinic")
    until = time.monotonic() + 20
    codes = set()
    while codes != {grpc.StatusCode.UNAUTHENTICATED} and time.monotonic() < until:
        time.sleep(0.2)
        codes = {refused(lambda: behind.call("ModelMetadata", nothing, behind.key))}
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}
    assert refused(lambda: behind.call("ModelMetadata", describe, metrics)) == grpc.StatusCode.PERMISSION_DENIED
    assert not (Path(behind.config.state) / "audit.jsonl").exists() or not behind.audit


def test_a_rate_counts_both_doors(behind: Behind) -> None:
    slow = add_key(behind.keys, "slow", ("predict",), requests_per_minute=1)
    behind.service.refresh_keys()  # as a replica does twice a second
    until = time.monotonic() + 20
    listing = message("ModelMetadataRequest")(name="cls")
    while time.monotonic() < until:  # until this door has looked, too; looking at models costs nothing
        with contextlib.suppress(grpc.RpcError):
            behind.call("ModelMetadata", listing, slow)
            break
        time.sleep(0.1)
    with grpc.insecure_channel(behind.address) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        codes, trailing = [], []
        for _ in range(3):
            try:
                ask(tensor().SerializeToString(), metadata=[("x-api-key", slow)], timeout=60)
                codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.append(error.code())
                trailing = error.trailing_metadata()
    assert codes[0] == grpc.StatusCode.OK and codes[-1] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(trailing)["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\xff\xff\xff no message", grpc.StatusCode.INVALID_ARGUMENT),
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (tensor(model_name=""), grpc.StatusCode.INVALID_ARGUMENT),
        (tensor(model_name="none"), grpc.StatusCode.NOT_FOUND),
        (tensor(model_name="../../v1/models"), grpc.StatusCode.INVALID_ARGUMENT),
        (tensor(model_name="cls/infer?x="), grpc.StatusCode.INVALID_ARGUMENT),
        (tensor(model_version="9"), grpc.StatusCode.NOT_FOUND),
        (message("ModelInferRequest")(model_name="cls"), grpc.StatusCode.INVALID_ARGUMENT),
        (message("ModelInferRequest")(model_name="cls", raw_input_contents=[b"x"]), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_is_against_the_protocol_is_refused(behind: Behind, request_: Any, code: grpc.StatusCode) -> None:
    assert refused(lambda: behind.call("ModelInfer", request_, behind.key)) == code


def test_tensors_that_do_not_fit_are_refused(behind: Behind) -> None:
    wrong = tensor()
    wrong.inputs[0].shape[0] = 3
    both = tensor()
    both.inputs[0].contents.fp32_contents.append(1.0)
    large = tensor(raw=False)
    large.inputs[0].datatype = "UINT8"
    large.inputs[0].contents.ClearField("fp32_contents")
    large.inputs[0].contents.uint_contents.extend([300] * 512)
    text = tensor(raw=False)
    text.inputs[0].datatype = "BYTES"
    for asked in (wrong, both, large, text):
        assert refused(lambda a=asked: behind.call("ModelInfer", a, behind.key)) == grpc.StatusCode.INVALID_ARGUMENT
    assert refused(lambda: behind.call("Nothing", b"", behind.key)) == grpc.StatusCode.UNIMPLEMENTED


def test_too_large_packed_and_slow_messages_cost_little(behind: Behind) -> None:
    asked = tensor()
    asked.raw_input_contents[0] = bytes(2 << 20)
    assert refused(lambda: behind.call("ModelInfer", asked, behind.key)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    packed = refused(lambda: behind.call("ModelInfer", asked, behind.key, compression=grpc.Compression.Gzip))
    assert packed in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    small = refused(lambda: behind.call("ModelInfer", tensor(), behind.key, compression=grpc.Compression.Gzip))
    assert small == grpc.StatusCode.UNIMPLEMENTED, "nothing is unpacked"
    never = threading.Event()

    def forever() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    with grpc.insecure_channel(behind.address) as channel:
        ask = channel.stream_unary(f"/{SERVICE}/ModelInfer")
        metadata = [("x-api-key", behind.key)]
        slow = [ask.future(forever(), metadata=metadata, timeout=60) for _ in range(behind.config.limits.waiting)]
        assert behind.call("ServerReady", message("ServerReadyRequest")()).ready, "health is answered all the same"
        codes = {one.exception().code() for one in slow}
        never.set()
    assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert behind.call("ModelInfer", tensor(), behind.key).model_name == "cls", "their places are free again"


def test_calls_that_name_a_model_hold_few_threads_and_take_small_messages(behind: Behind) -> None:
    never = threading.Event()

    def forever() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    with grpc.insecure_channel(behind.address) as channel:
        asks = [channel.stream_unary(f"/{SERVICE}/{name}") for name in ("ModelReady", "ModelMetadata")]
        metadata = [("x-api-key", behind.key)]
        slow = [ask.future(forever(), metadata=metadata, timeout=60) for ask in asks * 6]
        assert behind.call("ServerReady", message("ServerReadyRequest")()).ready
        codes = [one.exception().code() for one in slow]
        never.set()
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes and len(codes) == 12
    large = message("ModelReadyRequest")(name="a" * 20_000)
    for name in ("ModelReady", "ModelMetadata"):
        assert refused(lambda name=name: behind.call(name, large, behind.key)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert behind.call("ModelReady", message("ModelReadyRequest")(name="cls"), behind.key).ready


def test_the_bytes_of_inferences_are_bounded(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one message: while one is on its way there is none for the next."""
    monkeypatch.setattr(grpc_door, "_MOST_BYTES", 1)
    monkeypatch.setattr(grpc_door, "_SOON", 0.1)
    never = threading.Event()

    def forever() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    narrow = behind.config.model_copy(update={"grpc_port": free_port()})
    with grpc_door.opened(narrow) as address, grpc.insecure_channel(address) as channel:
        ask = channel.stream_unary(f"/{SERVICE}/ModelInfer")
        metadata = [("x-api-key", behind.key)]
        slow = [ask.future(forever(), metadata=metadata, timeout=60) for _ in range(3)]
        codes = sorted(one.exception().code().name for one in slow)
        never.set()
        assert "RESOURCE_EXHAUSTED" in codes and "CANCELLED" in codes
        door = Behind(narrow, behind.service, behind.key, address)
        assert door.call("ModelInfer", tensor(), behind.key).model_name == "cls", "the room is free again"


def test_room_is_given_back_as_soon_as_it_is_not_needed() -> None:
    room = grpc_door.Room(10)
    with room.taken(8, 0.0) as keep:
        with pytest.raises(RefusedError, match="room"), room.taken(8, 0.0):
            pass
        keep(2)
        with room.taken(8, 0.0), pytest.raises(RefusedError), room.taken(1, 0.0):
            pass
    with pytest.raises(ZeroDivisionError), room.taken(10, 0.0):
        raise ZeroDivisionError
    with room.taken(10, 0.0):
        pass


@pytest.mark.parametrize("status", [502, 503, 504, None], ids=str)
def test_a_server_that_is_unwell_is_told_as_such(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    """What stands before the replicas answers 502 and 504 for them; None: nothing at all."""
    monkeypatch.setattr(grpc_door, "_SOON", 0.5)
    over = threading.Event()

    class Unwell(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status is None:
                over.wait(30)
            else:
                self.send_error(status)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(status or 503)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unwell)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    unwell = behind.config.model_copy(update={"port": server.server_port, "grpc_port": free_port()})
    try:
        with grpc_door.opened(unwell) as address:
            door = Behind(unwell, behind.service, behind.key, address)
            assert not door.call("ServerLive", message("ServerLiveRequest")()).live
            assert not door.call("ServerReady", message("ServerReadyRequest")()).ready
            assert not door.call("ModelReady", message("ModelReadyRequest")(name="cls"), behind.key).ready
            assert refused(lambda: door.call("ModelInfer", tensor(), behind.key)) == grpc.StatusCode.UNAVAILABLE
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_it_listens_where_it_is_told_and_says_when_it_can_not(behind: Behind, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as probe, pytest.raises(OSError):
        probe.settimeout(2)
        probe.connect(("127.0.0.2", behind.config.grpc_port))
    with pytest.raises(ServingError, match="can't listen"), grpc_door.opened(behind.config):
        pass


def test_with_a_certificate_it_speaks_tls_on_both_sides(
    make_service: Callable[..., Any], small_bundles: dict[str, Path], tmp_path: Path
) -> None:
    files = certificate(tmp_path)
    trusted = grpc.ssl_channel_credentials(Path(files["certificate"]).read_bytes())
    name = [("grpc.ssl_target_name_override", "server.clinic.example")]
    with running(make_service, small_bundles, tmp_path, **files) as made:
        with grpc.secure_channel(made.address, trusted, options=name) as channel:
            ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            answer = ask(tensor().SerializeToString(), metadata=[("x-api-key", made.key)], timeout=60)
            assert message("ModelInferResponse").FromString(answer).model_name == "cls"
        assert refused(lambda: made.call("ServerLive", message("ServerLiveRequest")())) == grpc.StatusCode.UNAVAILABLE


def test_a_server_that_is_gone_is_unavailable(behind: Behind, tmp_path: Path) -> None:
    lonely = behind.config.model_copy(update={"port": free_port(), "grpc_port": free_port()})
    with grpc_door.opened(lonely) as address:
        alone = Behind(lonely, behind.service, behind.key, address)
        assert not alone.call("ServerLive", message("ServerLiveRequest")()).live
        assert refused(lambda: alone.call("ModelInfer", tensor(), behind.key)) == grpc.StatusCode.UNAVAILABLE


def test_one_port_for_both_is_refused(tmp_path: Path) -> None:
    content = {"models": {"a": {"versions": {"1": {"bundle": "x"}}}}, "port": 9000, "grpc_port": 9000}
    with pytest.raises(ConfigError, match="port of HTTP"):
        check_serving(content, source="test", folder=tmp_path)
