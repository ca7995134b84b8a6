"""A federation's server: Flower's SuperLink behind a gate.

SuperLink serves three interfaces on one port: Fleet (sites fetch work and bring updates; every request is signed by a
registered node key), Control (start a run, register a node) and Runtime (of the server's own processes). Control asks
for no password in Flower's open edition, and a run is code: whoever reaches it owns the server. So sites reach Fleet
alone, on the public port; the whole of it listens on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.errors import FederationError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET = "/v1/fleet/"
LOCK_SECONDS = 120
MOST_BYTES = 128 << 20
"""Of one request; Flower sends arrays in pieces of 5 MB."""
NODES = "nodes.json"
"""In the state's folder: Flower's number of each site."""
REFUSED = frozenset({"/v1/fleet/register-node", "/v1/fleet/unregister-node"})
"""Who belongs to the federation is said by certificates here, not by who calls."""


@dataclass(frozen=True, kw_only=True)
class ServerFiles:
    """Where the server's secrets and state lie.

    Attributes:
        ca, certificate, key: PEM files of ``medray federate provision``.
        state: folder of the database and of Flower's own files.
    """

    ca: Path
    certificate: Path
    key: Path
    state: Path


def serve(
    files: ServerFiles,
    nodes: Mapping[str, bytes],
    *,
    host: str,
    port: int,
    admin_port: int,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        files: of the server.
        nodes: public key (PEM) of each site that is let in; others known from before are let in no longer.
        host, port: where sites reach the server, over TLS.
        admin_port: on loopback, for ``medray federate run`` and ``status``.
        ready: called once both ports listen.

    Raises:
        FederationError: a port is taken.
    """
    files.state.mkdir(parents=True, exist_ok=True)
    _quiet(files.state)
    # Ports that are taken are found here: uvicorn would log and exit.
    for name, place in (("port", (host, port)), ("admin port", ("127.0.0.1", admin_port))):
        _free(name, *place)
    app = _superlink(files, admin_port)
    numbers = admit(app.state.linkstate_factory.state(), nodes)
    (files.state / NODES).write_text(json.dumps(numbers), encoding="utf-8")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(app, files, host, port, admin_port, ready))


def gate(app: App) -> App:
    """The part of SuperLink that sites may reach; anything else doesn't exist for them."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] == "http" and path.startswith(FLEET) and path not in REFUSED:
            await app(scope, _bounded(receive), send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    return guarded


def _bounded(receive: Receive) -> Receive:
    """A request's body up to a size: Flower reads all of it before it asks who sends it."""
    seen = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > MOST_BYTES else message

    return counted


def admit(state: Any, nodes: Mapping[str, bytes]) -> dict[str, int]:
    """Make Flower's register of nodes hold ``nodes`` and no other; the number of each.

    A node keeps its number while its key stays the same, so that runs go on after a restart of the server.
    """
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID

    known = {bytes(node.public_key): node for node in state.get_node_info()}
    for key, node in known.items():
        if key not in nodes.values() and node.status != "unregistered":
            state.delete_node(NOOP_FLWR_AID, node.node_id)
    for name, key in nodes.items():
        found = known.get(key)
        if found is not None and found.status == "unregistered":
            raise FederationError(
                f"site {name!r}: its key was taken out before and can't come back. Make a new one with: "
                f"medray federate provision --renew {name}"
            )
        if found is None:
            state.create_node(
                owner_aid=NOOP_FLWR_AID,
                owner_name=NOOP_ACCOUNT_NAME,
                public_key=key,
                heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
                name=name,
            )
    return {name: int(state.get_node_id_by_public_key(key)) for name, key in nodes.items()}


def _superlink(files: ServerFiles, admin_port: int) -> Any:
    """SuperLink as an ASGI application, configured by its documented options."""
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.main import create_app

    options = [
        "--host=127.0.0.1",
        f"--port={admin_port}",
        f"--ssl-ca-certfile={files.ca}",
        f"--ssl-certfile={files.certificate}",
        f"--ssl-keyfile={files.key}",
        f"--database={files.state / 'state.db'}",
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]
    module = sys.modules[flower_superlink.__module__]
    _patient_database()
    with _arguments(["flower-superlink", *options]):
        config = module._parse_superlink_lifespan_config()
    return create_app(config, module.SuperLinkLifespan)


def _patient_database() -> None:
    """Let SQLite wait for a lock as long as a busy machine needs.

    After Flower's five seconds a request fails, and with it the run: four sites that sent their updates at once
    to a machine under load were enough.
    """
    from flwr.supercore import sql_mixin

    patient = ("busy_timeout", str(LOCK_SECONDS * 1000))
    others = tuple(pragma for pragma in sql_mixin.SQLITE_PRAGMAS if pragma[0] != patient[0])
    sql_mixin.SQLITE_PRAGMAS = (*others, patient)


async def _run(app: Any, files: ServerFiles, host: str, port: int, admin_port: int, ready: Callable[[], None]) -> None:
    import uvicorn

    def server(application: App, host: str, port: int, lifespan: Any) -> uvicorn.Server:
        return uvicorn.Server(
            uvicorn.Config(
                application,
                host=host,
                port=port,
                lifespan=lifespan,
                ssl_certfile=str(files.certificate),
                ssl_keyfile=str(files.key),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )

    public, private = server(gate(app), host, port, "off"), server(app, "127.0.0.1", admin_port, "on")
    loop = asyncio.get_running_loop()

    def stop() -> None:
        public.should_exit = private.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    # `serve()` would take the signals for itself, each server the other's.
    tasks = [asyncio.create_task(each._serve()) for each in (private, public)]
    while not (public.started and private.started):
        if any(task.done() for task in tasks):
            stop()
            break
        await asyncio.sleep(0.05)
    else:
        ready()
    await asyncio.gather(*tasks)


def _free(name: str, host: str, port: int) -> None:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FederationError(
                f"{name} {host}:{port}: {error.strerror}. Choose another, or stop what uses it"
            ) from None


@contextlib.contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _quiet(home: Path) -> None:
    """Flower's files beside the state; it tells nobody what it does, and doesn't ask for updates."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_HOME"] = str(home / "flwr")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    # SuperLink starts programs of its own by name: they lie beside this interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
