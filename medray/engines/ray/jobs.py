"""A command of medray as a Ray Job: handed to a cluster, which goes on with it when the laptop is shut.

What travels is the command, and the YAML file that it names, as text. Data doesn't: ``data=`` is a path over there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import io
import os
import re
import secrets
import shlex
import socket
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from medray.config.compose import compose
from medray.config.schema import Experiment
from medray.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_JOBS_PORT = 8265  # Ray's dashboard, which also takes jobs
_REACH_SECONDS = 10.0
_AGAIN_SECONDS = 2.0  # between two attempts to take up a lost stream of logs
_CARRIED_BYTES = 96_000  # the system takes no environment variable above 128 KiB
_JOINS = ("tune", "train")  # verbs that run on a cluster when told its address
_CARRIED = "MEDRAY_SUBMITTED"
_STOP = {
    "RAY_JOB_STOP_SIGNAL": "SIGINT",  # as Ctrl-C: a study ends cleanly and can be resumed
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is handed to the cluster.

    Attributes:
        id: unique there.
        entrypoint: the shell command that runs on the head.
        environment: variables of its processes; the carried file is one of them.
        metadata: what the dashboard shows beside it.
    """

    id: str
    entrypoint: str
    environment: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """How a job stands.

    Attributes:
        id: its own.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's sentence about it.
        exit_code: of the command, once it has ended by itself.
    """

    id: str
    status: str
    message: str = ""
    exit_code: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


def build_job(words: Sequence[str], *, folder: str | None = None) -> Job:
    """The job of a command line of medray.

    A YAML file that the verb begins with is read here and written on the cluster, with the config groups beside it; all
    other paths are the cluster's own.

    Args:
        words: a verb and what follows it, such as ``["tune", "seg.yaml", "data=/mnt/medray/scans"]``.
        folder: on the cluster, in which the command runs and ``runs/`` lies; None: what ``MEDRAY_SHARED`` says on the
            cluster's machines, or else the home folder.

    Raises:
        ConfigError: no verb, a file that isn't here, or a field that its schema refuses.
    """
    rest = list(words)
    if rest[:1] == ["medray"]:
        del rest[0]
    if not rest or rest[0].startswith("-") or rest[0] == "submit":
        raise ConfigError(
            "submit needs a command of medray, after two dashes: medray submit -- tune search_spaces/seg.yaml "
            "data=/mnt/medray/scans"
        )
    asked = shlex.join(rest)
    verb, *rest = rest
    if verb in _JOINS:
        if any(word == "--address" or word.startswith("--address=") for word in rest):
            raise ConfigError(
                f"submit: leave --address out of '{verb}'; the job joins the cluster that it runs on. The cluster's "
                f"own address stands before the two dashes: medray submit --address http://HEAD:8265 -- {verb} ..."
            )
        rest += ["--address", "auto"]
    path = _yaml_here(verb, rest)
    if verb in _JOINS:
        compose(path, [word for word in rest if _is_override(word)])  # here, rather than in a log on the cluster
    stem = path.stem if path else ""
    identity = "-".join(filter(None, ("medray", verb, re.sub(r"[^\w.-]+", "-", stem), secrets.token_hex(4))))
    steps = [f"cd -- {shlex.quote(folder)}" if folder else 'cd -- "${MEDRAY_SHARED:-$HOME}"']
    environment = dict(_STOP)
    if path is not None:
        place = f"submitted/{identity}"
        rest[0] = f"{place}/{path.name}"
        environment[_CARRIED] = _pack(path)
        steps.append(
            f'mkdir -p {shlex.quote(place)} && printf %s "${_CARRIED}" | base64 -d | tar -xz -C {shlex.quote(place)}'
        )
    steps.append(shlex.join(["exec", "medray", verb, *rest]))
    data = [word.partition("=")[2] for word in rest if word.startswith("data=")]
    return Job(
        id=identity,
        entrypoint=" && ".join(steps),
        environment=environment,
        metadata={
            "medray": asked,
            **({"data": data[-1]} if data else {}),
        },
    )


def submit(
    words: Sequence[str], *, address: str | None = None, folder: str | None = None, cpus: float = 0, gpus: float = 0
) -> str:
    """Hand a command to the cluster; returns the job's id at once.

    Args:
        words, folder: as in :func:`build_job`.
        address: ``http://HEAD:8265`` (or https, or HOST alone); None: ``RAY_API_SERVER_ADDRESS``, or this machine.
        cpus, gpus: kept for the command itself, beside what it asks of the cluster. With none it runs on the head.

    Raises:
        ConfigError: as :func:`build_job`.
        StudyError: the cluster can't be reached, asks for a token, or refuses the one given.
    """
    job = build_job(words, folder=folder)
    with _speaking(address) as client:
        resources = {"entrypoint_num_cpus": cpus or None, "entrypoint_num_gpus": gpus or None}
        return client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=job.id,
            runtime_env={"env_vars": job.environment},
            metadata=job.metadata,
            **{name: value for name, value in resources.items() if value is not None},
        )


def state(identity: str, *, address: str | None = None) -> JobState:
    """How a job stands. Raises StudyError as :func:`submit`, and where the cluster knows no such job."""
    with _speaking(address) as client:
        return _state(client, identity)


def stop(identity: str, *, address: str | None = None) -> bool:
    """Have a job stop, as by Ctrl-C; whether it was still running. Raises as :func:`state`."""
    with _speaking(address) as client:
        return bool(client.stop_job(identity))


def logs(identity: str, *, address: str | None = None) -> str:
    """All that a job has printed so far. Raises as :func:`state`."""
    with _speaking(address) as client:
        return str(client.get_job_logs(identity))


def follow(identity: str, write: Callable[[str], None], *, address: str | None = None) -> JobState:
    """Hand on what a job prints, from its beginning to its end; a lost connection is taken up again.

    Args:
        identity: the job's.
        write: called with pieces of text, line ends included.
        address: as in :func:`submit`.

    Raises:
        StudyError: as :func:`state`.
    """
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        shown += len(text)
        write(text)

    while True:
        with _speaking(address) as client:
            with contextlib.suppress(*_lost()):
                asyncio.run(_tail(client, identity, shown, show))
            now = _state(client, identity)
            if now.is_over:
                rest = str(client.get_job_logs(identity))[shown:]
                if rest:
                    show(rest)
                return now
        time.sleep(_AGAIN_SECONDS)


async def _tail(client: JobSubmissionClient, identity: str, skip: int, write: Callable[[str], None]) -> None:
    """A stream begins with the log's first line, also when it is taken up again."""
    async for text in client.tail_job_logs(identity):
        if skip < len(text):
            write(text[skip:])
        skip = max(0, skip - len(text))


def _lost() -> tuple[type[Exception], ...]:
    import aiohttp

    return (RuntimeError, OSError, aiohttp.ClientError)


def _state(client: JobSubmissionClient, identity: str) -> JobState:
    found = client.get_job_info(identity)
    return JobState(
        id=identity, status=str(found.status), message=found.message or "", exit_code=found.driver_exit_code
    )


# What travels --------------------------------------------------------------------------------------------------------


def _yaml_here(verb: str, words: Sequence[str]) -> Path | None:
    """The file that the verb's words begin with, where it is a YAML file of this machine."""
    if not words or not words[0].lower().endswith((".yaml", ".yml")) or _is_override(words[0]):
        return None
    path = Path(words[0])
    if path.is_file():
        return path
    if path.is_absolute():
        return None  # the cluster's
    raise ConfigError(
        f"{path}: no such file. 'submit' reads the file of '{verb}' on this machine; one that lies on the cluster "
        f"needs its absolute path there"
    )


def _is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith(("~", "+")))


def _pack(path: Path) -> str:
    """The file and the config groups beside it, as base64 of a compressed tar."""
    sections = [name for name in Experiment.model_fields if (path.parent / name).is_dir()]
    files = [path, *(file for name in sections for file in sorted((path.parent / name).glob("*.yaml")))]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in files:
            content = file.read_bytes()
            entry = tarfile.TarInfo(file.relative_to(path.parent).as_posix())
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    text = base64.b64encode(gzip.compress(packed.getvalue(), mtime=0)).decode("ascii")
    if len(text) > _CARRIED_BYTES:
        raise ConfigError(
            f"{path}: with the config groups beside it {len(text)} bytes, and a job carries at most {_CARRIED_BYTES}. "
            f"Copy it to the cluster and name its absolute path there"
        )
    return text


# The cluster ---------------------------------------------------------------------------------------------------------


def job_address(address: str | None) -> str:
    """Where jobs are taken: ``http://HOST:8265`` for HOST, ``http://HOST:1234`` for HOST:1234, URLs as they are.

    Raises:
        ConfigError: a form that takes no jobs.
    """
    text = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).strip().rstrip("/")
    rule = f"Give the dashboard's address, such as http://HEAD:{_JOBS_PORT}"
    if "://" not in text:
        text = f"http://{text}"
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"{address}: the port is no number. {rule}") from None
    if parts.scheme not in ("http", "https"):
        host = parts.hostname or "HEAD"
        raise ConfigError(f"{address}: jobs are taken over HTTP only. {rule}: probably http://{host}:{_JOBS_PORT}")
    if not parts.hostname or parts.hostname == "auto":
        raise ConfigError(f"{address}: names no machine. {rule}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    if port is None and parts.scheme == "http":
        port = _JOBS_PORT
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "") + parts.path


def read_token() -> str | None:
    """The cluster's token, from where Ray takes it: ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``.

    Returns:
        None where there is none, or ``RAY_AUTH_MODE`` is ``disabled``.

    Raises:
        StudyError: ``RAY_AUTH_TOKEN_PATH`` names a file that can't be read or is empty, or ``RAY_AUTH_MODE`` is
            ``token`` and there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "").strip()
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise StudyError(f"RAY_AUTH_TOKEN_PATH={named}: can't be read ({error}). {_TOKEN_FIX}") from None
        token = ""
    if not token and named:
        raise StudyError(f"RAY_AUTH_TOKEN_PATH={named}: the file is empty. {_TOKEN_FIX}")
    if not token and mode == "token":
        raise StudyError(f"RAY_AUTH_MODE is token, but there is no token here. {_TOKEN_FIX}")
    return token or None


_TOKEN_FIX = (
    "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it, or copy it to ~/.ray/auth_token: the same "
    "token as on the cluster's machines ('ray get-auth-token' prints it there)"
)


@contextlib.contextmanager
def _speaking(address: str | None) -> Iterator[JobSubmissionClient]:
    """A client of the cluster; what goes wrong while it is used is told in our words."""
    url, token = job_address(address), read_token()
    _check_reachable(url)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {token}"} if token else None
    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would win over the address given
            client = JobSubmissionClient(url, headers=headers)
        yield client
    except AuthenticationError:
        what = "refuses this token" if token else "asks for a token"
        raise StudyError(f"the Ray cluster at {url} {what}. {_TOKEN_FIX}") from None
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise StudyError(f"the Ray cluster at {url} does not answer as one that takes jobs: {error}") from error
    except RuntimeError as error:
        raise StudyError(f"the Ray cluster at {url} refuses: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Ray wraps the answer's text, which may be a traceback: the last line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}" if lines else type(error).__name__


def _check_reachable(url: str) -> None:
    """Ray's client would wait for minutes where a firewall swallows what it sends."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise StudyError(
            f"no Ray cluster takes jobs at {url}: {error}. Give the head's dashboard, such as "
            f"--address http://HEAD:{_JOBS_PORT}. Where it listens on the head's loopback alone, reach it through a "
            f"tunnel: 'ray dashboard cluster.yaml', or ssh -L {_JOBS_PORT}:127.0.0.1:{_JOBS_PORT} HEAD"
        ) from error


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
