"""The client: what it sends, when it asks again, and when it gives up."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import medray
from medray.errors import ServingError
from medray.workflows.client import predict_by_server

FOUND = {"classes": ["ill"], "probabilities": {"normal": 0.1, "ill": 0.9}, "seconds": {}}
MODEL = {
    "name": "cls",
    "version": "1",
    "share": 0.9,
    "bundle": "b",
    "ndim": 2,
    "task": "classification",
    "classes": ["normal", "ill"],
    "engine": "onnx",
    "precision": "fp32",
    "fallback_reason": None,
    "intended_use": "Research use only.",
}


class Fake(ThreadingHTTPServer):
    """Answers with what stands in ``script`` (status, headers), then with 200; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, str]]] = []
        self.asked: list[tuple[str, Any, bytes]] = []
        self.jobs: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers, body))
        status, headers = self.server.script.pop(0) if self.server.script else (200, {})
        document: Any = FOUND if status == 200 else {"error": {"reason": "x", "message": "the reason"}}
        if self.path == "/v1/models":
            document = {"default": "cls", "models": [{**MODEL, "version": "0", "share": 0.1, "ndim": 3}, MODEL]}
        if self.path.startswith("/v1/jobs") and self.command in ("GET", "POST") and "answer" not in self.path:
            document = self.server.jobs.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "scan.png"
    path.write_bytes(b"\x89PNG pixels")
    return path


def url(fake: Fake) -> str:
    return f"http://127.0.0.1:{fake.server_address[1]}"


def test_busy_and_broken_answers_are_asked_for_again_under_one_key(fake: Fake, image: Path) -> None:
    fake.script = [(429, {"Retry-After": "0"}), (500, {}), (503, {})]
    assert medray.Client(url(fake) + "/", "secret").predict(image, model="cls") == FOUND
    assert [path for path, _, _ in fake.asked] == ["/v1/predict?model=cls"] * 4
    assert len({headers["Idempotency-Key"] for _, headers, _ in fake.asked}) == 1
    assert all(body == image.read_bytes() for _, _, body in fake.asked)
    assert fake.asked[0][1]["Authorization"] == "Bearer secret"


def test_a_long_prediction_is_a_job_that_is_sent_again_where_it_was_lost(fake: Fake, image: Path) -> None:
    states = [("running", 0.0), ("running", 0.5), ("lost", 0.5), ("running", 0.1), ("done", 1.0)]
    fake.jobs = [{"id": "a" * 32, "state": state, "progress": progress, "error": None} for state, progress in states]
    told: list[float] = []
    assert medray.Client(url(fake)).predict(image, model="seg", progress=told.append) == FOUND
    sent = [(path, headers["Idempotency-Key"]) for path, headers, body in fake.asked if body]
    assert [path for path, _ in sent] == ["/v1/jobs?model=seg"] * 2 and len({key for _, key in sent}) == 2
    assert told == [0.0, 0.5, 0.1, 1.0]
    assert fake.asked[-1][0] == f"/v1/jobs/{'a' * 32}" and not fake.jobs  # its answer is removed


def test_a_job_that_failed_for_good_is_not_sent_again(fake: Fake, image: Path) -> None:
    error = {"status": 503, "reason": "no-space", "message": "full"}
    fake.jobs = [
        {"id": "a" * 32, "state": "failed", "progress": 0.0, "error": error},
        {
            "id": "b" * 32,
            "state": "failed",
            "progress": 0.0,
            "error": {**error, "status": 422, "message": "two channels"},
        },
    ]
    with pytest.raises(ServingError, match=r"422.*two channels"):
        medray.Client(url(fake)).predict(image, progress=lambda _: None)
    assert len(fake.asked) == 2 and not fake.jobs  # 503 may pass, 422 does not


def test_what_is_refused_for_good_is_not_asked_again(fake: Fake, image: Path) -> None:
    fake.script = [(422, {})]
    with pytest.raises(ServingError, match=r"422.*the reason"):
        medray.Client(url(fake)).predict(image)
    assert len(fake.asked) == 1


def test_patience_ends(fake: Fake, image: Path) -> None:
    fake.script = [(503, {})] * 50
    with pytest.raises(ServingError, match="503"):
        medray.Client(url(fake), patience=0.3).predict(image)
    assert 1 < len(fake.asked) < 50
    with pytest.raises(ServingError, match="can't be reached"):
        medray.Client("http://127.0.0.1:9", patience=0.0).predict(image)
    with pytest.raises(ServingError, match="is no server's URL"):
        medray.Client("127.0.0.1:8000")
    with pytest.raises(ServingError, match="can't be read"):
        medray.Client(url(fake)).predict(image.with_name("none"))


def test_a_series_goes_as_a_zip_without_its_names(fake: Fake, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "Mustermann-Erika.dcm").write_bytes(b"one")
    medray.Client(url(fake)).predict(folder)
    archive = zipfile.ZipFile(io.BytesIO(fake.asked[0][2]))
    assert archive.namelist() == ["00000.dcm"] and archive.read("00000.dcm") == b"one"


def test_the_command_line_s_answers_by_server(fake: Fake, image: Path, tmp_path: Path) -> None:
    summary = predict_by_server(url(fake), [str(image)], tmp_path / "out")
    assert fake.asked[-1][0] == "/v1/predict?model=cls&version=1"  # the one whose facts are told
    assert summary.exit_code == 0 and summary.answers[0].classes == ("ill",)
    assert "scan.png,ill,0.100000,0.900000" in (tmp_path / "out" / "predictions.csv").read_text()
    with pytest.raises(ServingError, match="no model 'x'"):
        predict_by_server(url(fake), [str(image)], tmp_path / "out", model="x")


def test_patience_counts_from_the_first_failure(fake: Fake, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, real = [0.0], medray.Client._try

    def slow(self: Any, *words: Any) -> Any:
        now[0] += 100.0
        return real(self, *words)

    monkeypatch.setattr(medray.Client, "_try", slow)
    monkeypatch.setattr("medray.workflows.client.time.monotonic", lambda: now[0])
    fake.script = [(503, {})]
    assert medray.Client(url(fake), patience=15.0).predict(image) == FOUND
