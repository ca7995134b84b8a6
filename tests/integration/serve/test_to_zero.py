"""A server that stops its last replica where nobody asks, and starts one for whoever asks next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

import medray
from tests.integration.serve.conftest import free_port, started
from tests.unit.engines.ray.serve.samples import png, write_small


def replicas(state: Path) -> int:
    """Processes of this server that hold its bundles."""
    count = 0
    for process in psutil.process_iter():
        try:
            count += "ServeReplica" in process.name() + " ".join(process.cmdline()) and str(state) in " ".join(
                process.environ().values()
            )
        except (psutil.Error, OSError):
            continue
    return count


def wait(state: Path, number: int, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while replicas(state) != number:
        assert time.monotonic() < end, f"{replicas(state)} replicas, not {number}"
        time.sleep(0.5)


def test_to_zero_and_back(tmp_path: Path, repository: Path) -> None:
    port, state = free_port(), tmp_path / "state"
    bundle = write_small(tmp_path / "cls")
    content: dict[str, Any] = {
        "port": port,
        "state": str(state),
        "models": {"cls": {"runtime": "torch", "versions": {"1": {"bundle": str(bundle)}}}},
        "replicas": {"least": 0, "most": 1, "idle_seconds": 3},
    }
    (tmp_path / "a.png").write_bytes(png())
    with started(tmp_path, content, repository):
        client = medray.Client(f"http://127.0.0.1:{port}", patience=300.0)
        first = client.predict(tmp_path / "a.png")
        wait(state, 0)
        assert client.predict(tmp_path / "a.png")["probabilities"] == first["probabilities"], "it waited for a start"
        assert replicas(state) == 1
        wait(state, 0)
