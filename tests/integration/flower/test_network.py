"""A server and a site over TLS with node keys, on loopback; Flower's own app bundle is never asked for."""

from __future__ import annotations

import asyncio
import datetime as dt
import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from medray.engines.flower.line import Line, attend, check_server
from medray.errors import FederationError, PolicyError
from medray.privacy.credentials import issue_server, new_authority
from medray.workflows.federation.network import start_run, status
from medray.workflows.federation.provisioning import provision

SCRIPT = Path(__file__).with_name("network_server.py")

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "hostile"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "hostile.server:app"
clientapp = "hostile.client:app"
[tool.flwr.app.config]
answers = ""
"""
SERVER_APP = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while not list(grid.get_node_ids()):
        time.sleep(0.2)
    answers = []
    for order in ("work", "policy", "defect"):
        ask = [Message(RecordDict({"c": ConfigRecord({"order": order})}), n, "train") for n in grid.get_node_ids()]
        for reply in grid.send_and_receive(ask, timeout=60):
            answers.append(reply.error.reason if reply.has_error() else dict(reply.content["c"])["done"])
    Path(context.run_config["answers"]).write_text(json.dumps(answers))
"""
CLIENT_APP = """
from pathlib import Path
Path({marker!r}).write_text("code of a bundle was executed at a site")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


@dataclass(frozen=True)
class Place:
    """A running federation."""

    directory: Path
    port: int
    lines: dict[str, Line]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("federation")
    port, admin = free_port(), free_port()
    (folder / "sites.yaml").write_text(
        f"name: hearts\nserver: {{host: 127.0.0.1, port: {port}}}\nsites: [{{name: kiel}}, {{name: jena}}]\n"
    )
    made = provision(folder / "sites.yaml", out=folder / "hearts")
    lines = {}
    for name, kit in made.kits.items():
        with zipfile.ZipFile(kit) as archive:
            archive.extractall(folder)
        own = folder / f"hearts-{name}"
        lines[name] = Line(host="127.0.0.1", port=port, ca=own / "ca.crt", key=own / "node.key")
    with (folder / "server.log").open("w") as log:
        command = [sys.executable, str(SCRIPT), str(made.directory), str(port), str(admin)]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            text = (folder / "server.log").read_text()
            if "serving federation" in text or server.poll() is not None:
                break
            time.sleep(0.2)
        assert "serving federation 'hearts'" in text, text
        yield Place(made.directory, port, lines)
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_a_site_runs_what_is_installed_there_and_nothing_else(place: Place, tmp_path: Path) -> None:
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    app, marker, answers = tmp_path / "app", tmp_path / "executed", tmp_path / "answers.json"
    (app / "hostile").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "hostile" / "__init__.py").write_text("")
    (app / "hostile" / "server.py").write_text(SERVER_APP)
    (app / "hostile" / "client.py").write_text(CLIENT_APP.format(marker=str(marker)))
    asked: list[str] = []

    def answer(message: Message, context: Context) -> Message:
        asked.append(str(message.content["c"]["order"]))  # type: ignore[index]
        assert context.run_config["answers"] == str(answers)
        if asked[-1] == "policy":
            raise PolicyError("site 'kiel' refuses: too many rounds")
        if asked[-1] == "defect":
            raise ZeroDivisionError("patient 4711")
        return Message(RecordDict({"c": ConfigRecord({"done": "by kiel"})}), reply_to=message)

    told: list[str] = []
    line, over = place.lines["kiel"], threading.Event()
    site = threading.Thread(
        target=attend, args=(line, answer), kwargs={"stop": over.is_set, "told": told.append, "poll": 0.2}
    )
    site.start()
    try:
        number = start_run(place.directory, app, {"answers": str(answers)})
        for _ in range(600):
            if answers.exists() and answers.read_text():
                break
            time.sleep(0.2)
        found = status(place.directory)
    finally:
        over.set()
        site.join(timeout=30)
    assert not site.is_alive()
    done, refused, defect = json.loads(answers.read_text())
    assert (done, refused) == ("by kiel", "site 'kiel' refuses: too many rounds")
    assert "ZeroDivisionError" in defect and "4711" not in defect, "what an unforeseen error says may name a patient"
    assert asked == ["work", "policy", "defect"]
    assert not marker.exists()
    assert {row.name: row.status for row in found.sites} == {"kiel": "online", "jena": "registered"}
    assert [row.number for row in found.runs] == [number] and found.runs[0].bytes > 0


@pytest.mark.parametrize(
    "path", ["/v1/control/list-runs", "/v1/runtime/pull-messages", "/docs", "/v1/fleet/register-node"]
)
def test_sites_reach_nothing_but_their_own_interface(place: Place, path: str) -> None:
    context = ssl.create_default_context(cafile=str(place.lines["kiel"].ca))
    connection = http.client.HTTPSConnection("127.0.0.1", place.port, context=context, timeout=20)
    connection.request("POST", path, body=b"", headers={"content-type": "application/protobuf"})
    assert connection.getresponse().status == 404


def test_a_key_that_nobody_registered_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "sites.yaml").write_text("name: hearts\nserver: {host: 127.0.0.1}\nsites: [{name: kiel}]\n")
    other = provision(tmp_path / "sites.yaml", out=tmp_path / "other")
    with zipfile.ZipFile(other.kits["kiel"]) as archive:
        archive.extract("hearts-kiel/node.key", tmp_path)
    line = Line(host="127.0.0.1", port=place.port, ca=place.lines["kiel"].ca, key=tmp_path / "hearts-kiel" / "node.key")
    with pytest.raises(FederationError, match="refuses this site's key"):
        attend(line, lambda message, _: message, poll=0.2)


def test_a_server_that_cannot_be_trusted_is_told_nothing(place: Place, tmp_path: Path) -> None:
    good = place.lines["kiel"]
    assert check_server(good) > dt.datetime.now(dt.UTC) + dt.timedelta(days=360)
    stranger = new_authority("hearts", now=dt.datetime.now(dt.UTC))
    (tmp_path / "ca.crt").write_bytes(stranger.certificate)
    with pytest.raises(FederationError, match="its certificate is refused"):
        check_server(Line(host="127.0.0.1", port=place.port, ca=tmp_path / "ca.crt", key=good.key))
    long_ago = dt.datetime.now(dt.UTC) - dt.timedelta(days=30)
    expired = issue_server(stranger, ["127.0.0.1"], now=long_ago, days=1)
    (tmp_path / "s.crt").write_bytes(expired.certificate)
    (tmp_path / "s.key").write_bytes(expired.key)
    for certificate, reason in ((tmp_path / "s.crt", "expired"), (None, "speaks no TLS")):
        with listening(certificate, tmp_path / "s.key") as port, pytest.raises(FederationError, match=reason):
            check_server(Line(host="127.0.0.1", port=port, ca=tmp_path / "ca.crt", key=good.key))
    with pytest.raises(FederationError, match="can't be reached"):
        check_server(Line(host="127.0.0.1", port=free_port(), ca=good.ca, key=good.key))


class listening:
    """A server that takes one connection: with TLS where it has a certificate, else it answers in plain HTTP."""

    def __init__(self, certificate: Path | None, key: Path) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.context: ssl.SSLContext | None = None
        if certificate is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate, key)

    def __enter__(self) -> int:
        threading.Thread(target=self._serve, daemon=True).start()
        return int(self.socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _serve(self) -> None:
        try:
            connection, _ = self.socket.accept()
            if self.context is None:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()
            else:
                self.context.wrap_socket(connection, server_side=True)
        except OSError:
            pass  # the client turned away, which is what is tested


def test_a_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower reads a whole body before it asks who sends it."""
    from medray.engines.flower import superlink

    monkeypatch.setattr(superlink, "MOST_BYTES", 10)
    parts = [{"type": "http.request", "body": b"12345", "more_body": True}] * 5

    async def receive() -> dict[str, object]:
        return parts.pop()

    async def drain() -> list[str]:
        bounded = superlink._bounded(receive)  # type: ignore[arg-type]
        return [str((await bounded())["type"]) for _ in range(3)]

    assert asyncio.run(drain()) == ["http.request", "http.request", "http.disconnect"]
