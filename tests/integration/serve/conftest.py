"""One server for all tests of this folder, started as a user would, by ``medray serve serve.yaml``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from medray.engines.ray.serve.keys import add_key
from tests.unit.engines.ray.serve.samples import write_small

START_SECONDS = 500.0  # a loaded machine starts Ray slowly


@dataclass
class Server:
    """A running server, its configuration file, and keys that may predict, and do all."""

    url: str
    grpc: str
    path: Path
    state: Path
    process: subprocess.Popen[bytes]
    key: str
    admin: str
    bundles: dict[str, Path]

    def configure(self, **versions: tuple[str, float]) -> None:
        """Write the versions (bundle, share) of the model cls into the file."""
        document = yaml.safe_load(self.path.read_text())
        document["models"]["cls"]["versions"] = {
            name.lstrip("v"): {"bundle": str(self.bundles[bundle]), "share": share}
            for name, (bundle, share) in versions.items()
        }
        partial = self.path.with_suffix(".part")
        partial.write_text(yaml.safe_dump(document))
        partial.replace(self.path)

    def get(self, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, headers={"X-API-Key": self.admin})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    bundles = {"cls": write_small(root / "cls"), "other": write_small(root / "other", seed=1)}
    bundles["seg"] = write_small(root / "seg", "segmentation", ndim=3)
    port, grpc_port, state = free_port(), free_port(), root / "state"
    content: dict[str, Any] = {
        "port": port,
        "grpc_port": grpc_port,
        "state": str(state),
        "default": "cls",
        "models": {
            name: {"runtime": "torch", "versions": {"1": {"bundle": str(bundles[name])}}} for name in ("cls", "seg")
        },
        "batching": {"wait_ms": 20},
        "limits": {"body_mb": 8, "unpacked_mb": 64, "waiting": 16},
        "security": {"keys": str(root / "keys.json")},
    }
    key = add_key(root / "keys.json", "clinic", ("predict",))
    admin = add_key(root / "keys.json", "it", ("predict", "metrics", "admin"))
    with started(root, content, repository) as (path, process):
        yield Server(f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", path, state, process, key, admin, bundles)


@contextlib.contextmanager
def started(root: Path, content: dict[str, Any], repository: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """``medray serve`` by this configuration: its file, and the process, which answers by now."""
    path = root / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    paths = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    with (root / "out.txt").open("wb") as out:
        command = [sys.executable, "-m", "medray", "serve", str(path)]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=root)
    try:
        until = time.monotonic() + START_SECONDS
        while b"serving at" not in (root / "out.txt").read_bytes():
            assert process.poll() is None and time.monotonic() < until, (root / "out.txt").read_text()
            time.sleep(0.2)
        yield path, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.returncode == 0, "it is ended in order, not cut off: what was taken in is answered"
