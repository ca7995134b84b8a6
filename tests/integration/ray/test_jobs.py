"""``medray submit`` against a real head that takes jobs and asks for a token."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
TOKEN = "fedcba9876543210fedcba9876543210"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps a cluster on 127.0.0.1, which Ray otherwise turns into the machine's outer address."""


@dataclass(frozen=True)
class Head:
    """A head of this test's own: where it takes jobs, and the folder in which they run."""

    url: str
    shared: Path


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Ends with the processes that it started, and no others."""
    gcs, board, agent, grpc, metrics, runtime, client = free_ports(7)
    shared = tmp_path_factory.mktemp("shared")
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={board}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={runtime}", f"--ray-client-server-port={client}",
        "--num-cpus=2", "--disable-usage-stats", "--object-store-memory=100000000",
    ]  # fmt: skip
    environment = clean() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_TMPDIR": str(tmp_path_factory.mktemp("ray")),
        "MEDRAY_SHARED": str(shared),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    log = tmp_path_factory.mktemp("log") / "head.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=shared, start_new_session=True
        )
    try:
        for _ in range(300):
            if "Ray runtime started" in log.read_text(encoding="utf-8"):
                break
            if process.poll() is not None:
                pytest.fail(f"the head did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
        yield Head(url=f"http://127.0.0.1:{board}", shared=shared)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def clean() -> dict[str, str]:
    """This process's environment without what tells Ray of clusters and tokens."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | LOOPBACK


def medray(*words: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "medray"), *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean() | {"RAY_AUTH_TOKEN": TOKEN} | environment,
    )


@pytest.mark.timeout(300)
def test_a_command_is_submitted_and_followed_to_its_end(head: Head) -> None:
    done = medray("submit", "--address", head.url, "--follow", "--", "check", "phantom://xray-nodules?cases=4&size=32")
    assert done.returncode == 0, (done.stdout, done.stderr)
    identity, *printed = done.stdout.splitlines()
    assert identity.startswith("medray-check-") and any("4 cases" in line for line in printed), done.stdout
    state = medray("submit", "--address", head.url, "--status", identity)
    assert f"{identity}: SUCCEEDED" in state.stdout
    assert any(
        "4 cases" in line for line in medray("submit", "--address", head.url, "--logs", identity).stdout.splitlines()
    )


@pytest.mark.timeout(300)
def test_a_job_that_fails_fails_here_too(head: Head) -> None:
    done = medray("submit", "--address", head.url, "--follow", "--", "check", "/nowhere/at-all")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "/nowhere/at-all" in done.stdout and "FAILED" in done.stderr


@pytest.mark.timeout(300)
def test_a_study_returns_at_once_joins_the_cluster_and_stops_cleanly(head: Head, tmp_path: Path) -> None:
    space = tmp_path / "tiny.yaml"
    space.write_text(
        "data: phantom://xray-nodules?cases=16&size=32\n"
        "study: {name: tiny, budget: 5min, trials: 200}\n"
        "space:\n  optim.lr: {float: [1.0e-4, 1.0e-2], log: true}\n",
        encoding="utf-8",
    )
    submitted = medray("submit", "--address", head.url, "--", "tune", str(space))
    assert submitted.returncode == 0, submitted.stderr
    identity = submitted.stdout.strip()
    assert "--follow" in submitted.stderr
    said = ""
    for _ in range(120):
        said = medray("submit", "--address", head.url, "--logs", identity).stdout
        if "trial 0" in said or "SUCCEEDED" in said:
            break
        time.sleep(1)
    assert "trial 0" in said, said
    assert medray("submit", "--address", head.url, "--stop", identity).stdout == f"{identity}: asked to stop\n"
    state = ""
    for _ in range(90):
        state = medray("submit", "--address", head.url, "--status", identity).stdout
        if "RUNNING" not in state:
            break
        time.sleep(1)
    assert "STOPPED" in state
    # The study lies in the shared folder, whole enough to be resumed.
    assert (head.shared / "runs" / "tiny" / "study.yaml").is_file()
    assert (head.shared / "runs" / "tiny" / "study.db").is_file()
    assert (head.shared / "submitted" / identity / "tiny.yaml").read_text(encoding="utf-8") == space.read_text(
        encoding="utf-8"
    )


@pytest.mark.timeout(300)
def test_without_the_right_token_nothing_is_done(head: Head, tmp_path: Path) -> None:
    elsewhere = {"HOME": str(tmp_path)}
    missing = medray("submit", "--address", head.url, "--", "doctor", RAY_AUTH_TOKEN="", **elsewhere)
    assert missing.returncode == 2 and "asks for a token. Set RAY_AUTH_TOKEN" in missing.stderr
    wrong = medray("submit", "--address", head.url, "--", "doctor", RAY_AUTH_TOKEN="f" * 32, **elsewhere)
    assert wrong.returncode == 2 and "refuses this token" in wrong.stderr
    unknown = medray("submit", "--address", head.url, "--status", "medray-none")
    assert unknown.returncode == 2 and "medray-none" in unknown.stderr
