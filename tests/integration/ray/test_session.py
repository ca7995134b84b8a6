"""Ray itself: what a local session leaves open, and a cluster that is there already."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def python(code: str, *, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: this one may hold a session already."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | environment,
    )


def test_a_local_session_is_silent_and_listens_on_loopback_alone() -> None:
    done = python(
        """
        import os, psutil
        import ray  # imported before, as by whoever uses the engine
        from medray.engines.ray.session import ray_session

        before = os.environ.get("OMP_NUM_THREADS")
        with ray_session(cpus=2, threads=1) as session:
            assert (session.cpus, session.is_local) == (2.0, True)
            me = psutil.Process()
            for process in [me, *me.children(recursive=True)]:
                for connection in process.net_connections():
                    if connection.status == psutil.CONN_LISTEN:
                        assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (process, connection)
            threads = ray.get(ray.remote(lambda: os.environ["OPENBLAS_NUM_THREADS"]).remote())
            assert threads == "1"
            with ray_session(cpus=7) as inner:
                assert inner.cpus == 2.0
            assert ray.is_initialized(), "what one did not start one does not end"
        assert not ray.is_initialized()
        assert os.environ.get("OMP_NUM_THREADS") == before and "TUNE_DISABLE_SIGINT_HANDLER" not in os.environ
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_no_cluster_at_the_address() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    done = python(
        f"""
        from medray.engines.ray.session import ray_session
        from medray.errors import StudyError
        try:
            with ray_session(address="127.0.0.1:{port}"):
                pass
        except StudyError as error:
            print(error)
        """,
        timeout=60,
    )
    assert f"no Ray cluster could be joined at 127.0.0.1:{port}" in done.stdout, done.stderr


TOKEN = "0123456789abcdef0123456789abcdef"
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Keeps a cluster on 127.0.0.1, which Ray otherwise turns into the machine's outer address."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head of its own on loopback, which asks for a token. Ends with the processes that it started."""
    ports = []
    sockets = [socket.socket() for _ in range(5)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
        ports.append(one.getsockname()[1])
    for one in sockets:
        one.close()
    gcs, agent, metrics, runtime, client = ports
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={runtime}", f"--ray-client-server-port={client}", "--num-cpus=2",
        "--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000",
    ]  # fmt: skip
    environment = (
        os.environ
        | LOOPBACK
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_TMPDIR": str(tmp_path_factory.mktemp("ray")),
        }
    )
    log = tmp_path_factory.mktemp("log") / "head.txt"
    with log.open("w") as output:
        head = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT)
    try:
        for _ in range(300):
            if "Ray runtime started" in log.read_text(encoding="utf-8"):
                break
            if head.poll() is not None:
                pytest.fail(f"the head did not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
        yield f"127.0.0.1:{gcs}"
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            head.kill()


@pytest.mark.timeout(300)
def test_a_study_runs_on_a_cluster_that_is_there(cluster: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("study_process.py")
    done = python(
        f"""
        import runpy, sys
        sys.argv = ["study_process.py", {str(tmp_path)!r}, "3", "0.0", {cluster!r}]
        runpy.run_path({str(script)!r}, run_name="__main__")
        """,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=TOKEN,
        **LOOPBACK,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r'\["completed", (\d)', done.stdout) == ["0", "1", "2"]


@pytest.mark.timeout(300)
def test_a_cluster_that_asks_for_a_token_says_so(cluster: str) -> None:
    code = f"""
        from medray.engines.ray.session import ray_session
        from medray.errors import StudyError
        try:
            with ray_session(address={cluster!r}):
                pass
        except StudyError as error:
            print(error)
        """
    for environment in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32}, {"RAY_AUTH_MODE": "disabled"}):
        done = python(code, **environment, **LOOPBACK)
        assert "could not be joined" in done.stdout and "RAY_AUTH_TOKEN" in done.stdout, (done.stdout, done.stderr)
