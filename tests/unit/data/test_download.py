"""Downloads against a local server that cuts connections, ignores ranges, lies and is absent."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from medray.data import download
from medray.data.download import DATASETS, PublicSet, fetch
from medray.errors import DownloadError

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server:
    """Serves CONTENT; ``cuts`` are the bytes after which the next connections break."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.cuts: list[int] = []
        self.ranges = True
        self.status = 200
        self.asked: list[str | None] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                owner.asked.append(wanted)
                if owner.status != 200:
                    self.send_error(owner.status)
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and owner.ranges else 0
                body = owner.content[start:]
                if start >= len(owner.content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(owner.content) - 1}/{len(owner.content)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if owner.cuts:
                    self.wfile.write(body[: owner.cuts.pop(0)])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.close()
                    return
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    entry = PublicSet(
        url="http://unused.invalid/toy.npz",
        file="toy.npz",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        task="classification",
        licence="none",
        description="bytes",
    )
    monkeypatch.setitem(DATASETS, "toy", entry)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_a_file_comes_whole_with_progress_and_is_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    path = fetch("toy", tmp_path, base_url=server.url, progress=lambda *s: steps.append(s))
    assert path == tmp_path / "toy.npz"
    assert path.read_bytes() == CONTENT
    assert steps[-1] == (len(CONTENT), len(CONTENT), "toy.npz")
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)
    fetch("toy", tmp_path, base_url=server.url)
    assert len(server.asked) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["toy.npz"]


def test_a_cut_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000]
    path = fetch("toy", tmp_path, base_url=server.url)
    assert path.read_bytes() == CONTENT
    assert server.asked[0] is None
    starts = [int((r or "bytes=0-").removeprefix("bytes=").rstrip("-")) for r in server.asked]
    assert starts == sorted(starts) and 0 < starts[1] <= 100_000 and starts[2] <= 150_000


def test_an_interrupted_session_goes_on_in_the_next(server: Server, tmp_path: Path) -> None:
    server.cuts = [80_000, 0, 0, 0, 0, 0, 0]
    with pytest.raises(DownloadError, match="bytes are kept: run it again"):
        fetch("toy", tmp_path, base_url=server.url)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.npz.part"]
    kept = (tmp_path / "toy.npz.part").stat().st_size
    server.cuts, server.asked = [], []
    assert fetch("toy", tmp_path, base_url=server.url).read_bytes() == CONTENT
    assert server.asked == [f"bytes={kept}-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = [100_000], False
    assert fetch("toy", tmp_path, base_url=server.url).read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch("toy", tmp_path, base_url=server.url)
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT
    assert fetch("toy", tmp_path, base_url=server.url).read_bytes() == CONTENT


def test_what_is_longer_than_it_should_be_is_not_written_to_the_end(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT * 20
    with pytest.raises(DownloadError, match=r"not toy\.npz"):
        fetch("toy", tmp_path, base_url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_damaged_on_disk_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy.npz").write_bytes(b"damaged")
    assert fetch("toy", tmp_path, base_url=server.url).read_bytes() == CONTENT


def test_not_found_is_said_at_once_and_busy_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(DownloadError, match="404"):
        fetch("toy", tmp_path, base_url=server.url)
    assert len(server.asked) == 1
    server.status, server.asked = 503, []
    with pytest.raises(DownloadError, match="503"):
        fetch("toy", tmp_path, base_url=server.url)
    assert len(server.asked) == 5


def test_no_connection_names_the_address(server: Server, tmp_path: Path) -> None:
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1"):
        fetch("toy", tmp_path, base_url=server.url)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(DownloadError, match="Did you mean breastmnist"):
        fetch("breastmnst", Path())


def test_the_pinned_hashes_are_those_of_the_real_files(shared_data: Path) -> None:
    for entry in DATASETS.values():
        content = (shared_data / "medmnist" / entry.file).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (entry.sha256, entry.size)
