"""The command that a job runs, what travels with it, where it is sent, and the token; without a cluster."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from medray.engines.ray.jobs import build_job, job_address, read_token, state, submit
from medray.errors import ConfigError, StudyError

SPACE = """
defaults: [augment: ours, _self_]
study: {name: tiny, trials: 2}
space:
  optim.lr: {float: [1.0e-4, 1.0e-2], log: true}
"""


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def space(tmp_path: Path) -> Path:
    folder = tmp_path / "my spaces"
    (folder / "augment").mkdir(parents=True)
    (folder / "augment" / "ours.yaml").write_text("p_flip: 0.5\n", encoding="utf-8")
    path = folder / "seg it's.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return path


def run(entrypoint: str, environment: dict[str, str], shared: Path) -> subprocess.CompletedProcess[str]:
    """As Ray does on the head, with a ``medray`` that says what it was given."""
    bin_ = shared.parent / "bin"
    bin_.mkdir(exist_ok=True)
    fake = bin_ / "medray"
    fake.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    shared.mkdir(exist_ok=True)
    variables = environment | {"PATH": f"{bin_}:{os.environ['PATH']}", "MEDRAY_SHARED": str(shared), "HOME": "/"}
    return subprocess.run(entrypoint, shell=True, capture_output=True, text=True, env=variables)


def test_the_file_travels_as_text_and_the_data_as_a_path(space: Path, tmp_path: Path) -> None:
    data = "/mnt/medray/Überblick $HOME (2)/scans"
    job = build_job(["medray", "tune", str(space), f"data={data}", "study.budget=1h"])
    assert len(job.entrypoint) < 1000 and "working_dir" not in job.environment
    assert job.metadata["data"] == data and job.metadata["medray"].startswith("tune ")
    done = run(job.entrypoint, job.environment, tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    where, verb, file, *rest = done.stdout.splitlines()
    assert (where, verb) == (str(tmp_path / "shared"), "tune")
    assert rest == [f"data={data}", "study.budget=1h", "--address", "auto"]
    written = tmp_path / "shared" / file
    assert written.name == space.name and written.read_text(encoding="utf-8") == SPACE
    # Config groups beside the file are a part of it.
    assert (written.parent / "augment" / "ours.yaml").read_text(encoding="utf-8") == "p_flip: 0.5\n"


def test_two_jobs_of_one_file_do_not_meet(space: Path) -> None:
    first, second = build_job(["tune", str(space)]), build_job(["tune", str(space)])
    assert first.id != second.id and first.id.startswith("medray-tune-seg-it-s-")


def test_a_stop_is_a_ctrl_c() -> None:
    assert build_job(["doctor"]).environment["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_the_folder_can_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "a 'folder'"
    folder.mkdir()
    done = run(build_job(["doctor"], folder=str(folder)).entrypoint, {}, tmp_path / "shared")
    assert done.stdout.splitlines() == [str(folder), "doctor"]
    missing = run(build_job(["doctor"], folder=str(tmp_path / "none")).entrypoint, {}, tmp_path / "shared")
    assert missing.returncode != 0 and "none" in missing.stderr and not missing.stdout


def test_other_verbs_join_no_cluster_and_clusters_files_stay_there() -> None:
    assert build_job(["check", "phantom://xray-nodules?cases=4&size=32"]).entrypoint.endswith(
        "exec medray check 'phantom://xray-nodules?cases=4&size=32'"
    )
    assert build_job(["train", "/mnt/medray/experiment.yaml"]).entrypoint.endswith(
        "exec medray train /mnt/medray/experiment.yaml --address auto"
    )
    assert build_job(["tune", "--resume", "runs/seg"]).entrypoint.endswith("--resume runs/seg --address auto")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "needs a command"),
        (["--follow"], "needs a command"),
        (["submit", "tune"], "needs a command"),
        (["tune", "here/no.yaml"], "no such file"),
        (["tune", "--address", "auto"], "leave --address out"),
        (["train", "--address=h:6379"], "leave --address out"),
        (["tune", "optim.lrr=1"], "optim.lr"),
    ],
)
def test_what_cannot_be_submitted_is_told_here(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_job(words)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seg.yaml"
    path.write_text("# " + os.urandom(120_000).hex(), encoding="utf-8")
    with pytest.raises(ConfigError, match="Copy it to the cluster"):
        build_job(["tune", str(path)])


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (None, "http://127.0.0.1:8265"),
        ("head", "http://head:8265"),
        ("head:80", "http://head:80"),
        ("http://head/", "http://head:8265"),
        ("https://ray.hospital.example/jobs/", "https://ray.hospital.example/jobs"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(given: str | None, url: str) -> None:
    assert job_address(given) == url


def test_an_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")
    assert job_address(None) == "http://elsewhere:1" and job_address("head") == "http://head:8265"


@pytest.mark.parametrize("given", ["ray://head:10001", "auto", "http://head:port", "gs://head"])
def test_addresses_that_take_no_jobs(given: str) -> None:
    with pytest.raises(ConfigError, match=r"http://(HEAD|head):8265"):
        job_address(given)


def test_the_token_is_found_where_ray_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token() is None
    default = tmp_path / "home" / ".ray" / "auth_token"
    default.parent.mkdir(parents=True)
    default.write_text("third\n", encoding="utf-8")
    assert read_token() == "third"
    other = tmp_path / "token"
    other.write_text("second", encoding="utf-8")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    assert read_token() == "second"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert read_token() == "first"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert read_token() is None


def test_a_token_that_is_missing_is_told_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(StudyError, match="there is no token here"):
        read_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(StudyError, match=r"RAY_AUTH_TOKEN_PATH=.*none: can't be read"):
        read_token()
    (tmp_path / "none").write_text(" \n", encoding="utf-8")
    with pytest.raises(StudyError, match="the file is empty"):
        read_token()


class _Head(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does where a token is missing (401) or wrong (403), else with no Ray's answer."""

    seen: list[str | None]

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        self.seen.append(given)
        self.send_response(200 if given == "Bearer right" else 403 if given else 401)
        self.end_headers()
        self.wfile.write(b"<html>not a Ray cluster</html>")

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def head() -> Iterator[str]:
    _Head.seen = []
    server = http.server.HTTPServer(("127.0.0.1", 0), _Head)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_refused_token_is_one_clear_error(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray would let it win over the address given
    with pytest.raises(StudyError, match=r"asks for a token\. Set RAY_AUTH_TOKEN"):
        submit(["doctor"], address=head)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(StudyError, match="refuses this token") as caught:
        state("medray-1", address=head)
    assert "wrong" not in str(caught.value), "a token is never shown"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with pytest.raises(StudyError, match="does not answer as one that takes jobs"):
        state("medray-1", address=head)
    assert _Head.seen == [None, "Bearer wrong", "Bearer right"]


def test_nothing_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    with pytest.raises(StudyError, match=f"no Ray cluster takes jobs at http://127.0.0.1:{port}.*ray dashboard"):
        submit(["doctor"], address=f"127.0.0.1:{port}")
