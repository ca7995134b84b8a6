"""The federation over a network: run its server and look after its runs. A site's end is in ``attending``."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.data.writers.atomic import appearing
from medray.errors import FederationError
from medray.privacy.credentials import node_of

ADMIN_PORT = 9444
"""On the server's loopback: runs are started and watched from that machine."""
CONNECTION = "federation"

Told = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SiteStatus:
    """A site as the server sees it: ``registered`` until it first connects, then ``online`` or ``offline``."""

    name: str
    status: str
    since: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run as the server sees it; seconds since it began, bytes over the wire in both directions."""

    number: str
    status: str
    seconds: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """Sites and runs of a federation."""

    sites: tuple[SiteStatus, ...]
    runs: tuple[RunStatus, ...]


def serve_federation(
    directory: Path,
    *,
    host: str = "0.0.0.0",
    port: int | None = None,
    admin_port: int = ADMIN_PORT,
    told: Told = lambda _: None,
) -> None:
    """Run a provisioned federation's server until it is stopped.

    Args:
        directory: of ``medray federate provision``; ``authority/`` isn't needed here.
        host: address to listen at.
        port: for the sites; None for the one in ``sites.yaml``.
        admin_port: on loopback, for ``medray federate run`` and ``status``.
        told: hears a line of each thing that a person should know.

    Raises:
        FederationError: the folder is none, no site has a valid certificate, a port is taken.
    """
    from medray.engines.flower.superlink import ServerFiles, serve

    server = directory / "server"
    about = _about(directory)
    os.umask(0o077)  # the database has every site's updates
    nodes: dict[str, bytes] = {}
    authority, now = (server / "ca.crt").read_bytes(), dt.datetime.now(dt.UTC)
    for path in sorted((server / "sites").glob("*.crt")):
        try:
            site, key = node_of(path.read_bytes(), authority, now=now)
        except FederationError as error:
            told(f"not let in: {error}")
            continue
        nodes[site] = key
    if not nodes:
        raise FederationError(
            f"{server / 'sites'}: no site has a valid certificate. Make some with: medray federate provision"
        )
    port = port or int(about["port"])
    files = ServerFiles(
        ca=(server / "ca.crt").resolve(),
        certificate=(server / "server.crt").resolve(),
        key=(server / "server.key").resolve(),
        state=(server / "state").resolve(),
    )
    _introduce(directory, admin_port)
    ready = f"serving federation {about['name']!r} at {host}:{port} for {', '.join(nodes)}"
    serve(files, nodes, host=host, port=port, admin_port=admin_port, ready=lambda: told(ready))


def start_run(directory: Path, app: Path, config: dict[str, str | int | float | bool]) -> str:
    """Start a run of a Flower app at a federation's server, on this machine; its number.

    Args:
        directory: of the federation, whose server runs.
        app: folder of the app. It is executed on the server, and by no site.
        config: over the app's own ``[tool.flwr.app.config]``.
    """
    words = [f"--run-config={name}={json.dumps(value)}" for name, value in config.items()]
    return str(_flwr(directory, "run", str(app.resolve()), CONNECTION, *words)["run-id"])


def stop_run(directory: Path, number: str) -> None:
    """Stop a run; sites are told with their next question for work."""
    _flwr(directory, "stop", number, CONNECTION)


def status(directory: Path) -> Status:
    """Who is there, and what runs.

    Raises:
        FederationError: the server isn't up on this machine.
    """
    names = _names(directory)
    nodes = _flwr(directory, "supernode", "list", CONNECTION).get("nodes", [])
    runs = _flwr(directory, "list", CONNECTION).get("runs", [])
    return Status(
        sites=tuple(
            SiteStatus(name=names[node["node-id"]], status=str(node.get("status")), since=_since(node))
            for node in nodes
            if node["node-id"] in names
        ),
        runs=tuple(
            RunStatus(
                number=str(run["run-id"]),
                status=str(run["status"]),
                seconds=float(run.get("elapsed") or 0.0),
                bytes=int((run.get("network-traffic") or {}).get("total-bytes", 0)),
            )
            for run in runs
        ),
    )


def _since(node: dict[str, Any]) -> str:
    """When its status began, as far as Flower says."""
    found = node.get({"online": "online-at", "offline": "offline-at"}.get(str(node.get("status")), "created-at"))
    return str(found or "")


def _about(directory: Path) -> dict[str, Any]:
    path = directory / "server" / "federation.json"
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FederationError(
            f"{directory}: no federation ({error}). Give the folder that medray federate provision made"
        ) from None
    return about


def _introduce(directory: Path, admin_port: int) -> None:
    """Tell Flower's own command line where the server is."""
    home = directory / "server" / "state" / "flwr"
    ca = (directory / "server" / "ca.crt").resolve()
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{admin_port}"\n'
        f"root-certificates = {json.dumps(str(ca))}\n"
    )
    with appearing(home / "config.toml") as partial:
        partial.write_text(text, encoding="utf-8")


def _names(directory: Path) -> dict[str, str]:
    """Of the sites, by Flower's number."""
    from medray.engines.flower.superlink import NODES

    path = directory / "server" / "state" / NODES
    numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {str(number): name for name, number in numbers.items()}


def _flwr(directory: Path, *words: str) -> dict[str, Any]:
    """Flower's command line, asked for JSON."""
    _about(directory)
    home = (directory / "server" / "state" / "flwr").resolve()
    if not (home / "config.toml").is_file():
        raise FederationError(
            f"{directory}: its server has never been started on this machine: medray federate server {directory}"
        )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    command = [str(Path(sys.executable).parent / "flwr"), *words, "--format=json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    except subprocess.TimeoutExpired:
        raise FederationError(f"flwr {words[0]}: no answer in two minutes. Is the machine overloaded?") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise FederationError(
            f"flwr {words[0]}: {(done.stderr or done.stdout).strip()[-500:] or 'no answer'}. Is the federation's "
            f"server up on this machine? medray federate server {directory}"
        ) from None
    if not answer.get("success", True):
        raise FederationError(f"flwr {words[0]}: {answer.get('error-message') or answer}")
    return answer
