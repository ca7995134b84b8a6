"""A server, run as a user runs it: ``medray serve`` in a process of its own; and clients that keep it busy."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT

START_SECONDS = 300.0


@contextlib.contextmanager
def serving(folder: Path, models: dict[str, Path], *, runtime: str = "onnx", **keys: Any) -> Iterator[tuple[str, int]]:
    """A running server; yields its host and port.

    Args:
        folder: for its configuration and state.
        models: bundles by name.
        runtime: of all of them.
        keys: of the configuration.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    content = {
        "port": port,
        "state": str(folder / "state"),
        "models": {
            name: {"runtime": runtime, "versions": {"1": {"bundle": str(path)}}} for name, path in models.items()
        },
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "serve.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    log = folder / "out.txt"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "medray", "serve", str(folder / "serve.yaml")]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        until = time.monotonic() + START_SECONDS
        while b"serving at" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start: {log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.2)
        yield "127.0.0.1", port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Load:
    """What clients met.

    Attributes:
        seconds: of each answered request.
        wall: of all of it.
        failed: answers other than 200, and lost connections.
    """

    seconds: list[float] = field(default_factory=list)
    wall: float = 0.0
    failed: int = 0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.wall if self.wall else 0.0

    def quantile(self, share: float) -> float:
        """Of the seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def load(
    address: tuple[str, int], clients: int, seconds: float, request: Callable[[http.client.HTTPConnection], None]
) -> Load:
    """Have clients ask again and again over connections that they keep, for so many seconds.

    Args:
        address: host and port.
        clients: threads.
        seconds: that it lasts.
        request: sends one request.
    """
    found, lock, until = Load(), threading.Lock(), time.monotonic() + seconds

    def ask() -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        while time.monotonic() < until:
            begin = time.monotonic()
            try:
                request(connection)
                answer = connection.getresponse()
                answer.read()
                well = answer.status == 200
            except (OSError, http.client.HTTPException):
                connection.close()
                well = False
            with lock:
                if well:
                    found.seconds.append(time.monotonic() - begin)
                else:
                    found.failed += 1
        connection.close()

    begin = time.monotonic()
    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.wall = time.monotonic() - begin
    return found
