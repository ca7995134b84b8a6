"""A server on this machine, or on a cluster: Ray, Serve, and the application on it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medray import logs
from medray.config.serving import ServeConfig
from medray.engines.ray.serve import grpc_door, haproxy
from medray.engines.ray.serve.fleet import ACCEPTED
from medray.engines.ray.serve.meters import FOLDER
from medray.engines.ray.serve.work import WORK
from medray.engines.ray.session import ray_session, usable_cpus
from medray.errors import ServingError

_QUICK = {
    # A killed proxy is missed, and another started, within seconds; as Ray comes it takes half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "1",
    # On a loaded machine a proxy needs longer to start than the 5 s after which Ray kills it, and begins anew.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
_NAME = "medray"
NOT_THERE = (
    "grpc_port: gRPC is answered where 'medray serve' serves one machine; on a cluster it would be one door for all. "
    "Leave it out, and use HTTP"
)


@contextlib.contextmanager
def serving(config: ServeConfig, path: Path | None, *, address: str | None = None) -> Iterator[str]:
    """Serve until the block ends.

    Args:
        config: of the server.
        path: of its file, to be followed.
        address: of a Ray cluster; None for a session of this machine's own, on loopback.

    Yields:
        The server's URL. Every bundle has reproduced its golden outputs.

    Raises:
        ServingError: the port is taken, a cluster without keys, or the application doesn't come up; with its reason.
    """
    state = Path(config.state)
    metrics = state / "metrics"
    if address is not None and config.grpc_port is not None:
        raise ServingError(NOT_THERE)
    if address is not None and config.security.keys is None:
        raise ServingError(
            "on a cluster other machines reach the server, and security.keys is not set, so that anyone could ask. "
            "Make keys with 'medray keys add NAME --file keys.json', and set security.keys: keys.json"
        )
    _require_free(config)
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Of replicas of a server that is gone.
        shutil.rmtree(metrics, ignore_errors=True)
        shutil.rmtree(state / WORK, ignore_errors=True)
        (state / ACCEPTED).unlink(missing_ok=True)
        metrics.mkdir()
    except OSError as error:
        raise ServingError(
            f"{state}: can't be written ({error.strerror or error}). Set state: another folder"
        ) from None
    variables = dict(_QUICK)
    secure = config.security.certificate is not None
    if address is None and config.fast_proxy and not secure:
        variables |= haproxy.variables(config, state)
    try:
        with _set(variables), ray_session(address=address, cpus=usable_cpus() if address is None else None):
            yield from _run(config, path, {FOLDER: str(metrics.absolute())}, local=address is None)
    finally:
        if haproxy.SOCKET in variables:
            shutil.rmtree(Path(variables[haproxy.SOCKET]).parent, ignore_errors=True)


def _run(config: ServeConfig, path: Path | None, environment: dict[str, str], *, local: bool) -> Iterator[str]:
    from ray import serve

    from medray.engines.ray.serve.replica import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    security = config.security
    options: dict[str, Any] = {"host": config.host, "port": config.port, "request_timeout_s": None}
    if security.certificate is not None:
        options |= {"ssl_certfile": security.certificate, "ssl_keyfile": security.private_key}
    try:
        serve.start(
            proxy_location="HeadOnly" if local else "EveryNode",
            http_options=options,
            logging_config={"enable_access_log": False, "log_level": "ERROR"},
        )
        serve.run(application(config, path, environment, loopback=local), name=_NAME, route_prefix="/")
        scheme = "https" if security.certificate is not None else "http"
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"{scheme}://{host}:{config.port}"
    except Exception as error:
        reason = _reason(error)
        _end(local=local)
        raise ServingError(f"the server did not come up: {reason}") from error
    try:
        with contextlib.ExitStack() as doors:
            also: dict[str, Any] = {}
            if config.grpc_port is not None:
                also["grpc"] = doors.enter_context(grpc_door.opened(config))
            logs.event("serving", url=url, models=list(config.models), **also)
            yield url
    finally:
        _end(local=local)


def _end(*, local: bool) -> None:
    """End all of a session of our own; on a cluster our application alone, for others may serve there as well."""
    from ray import serve

    with contextlib.suppress(Exception):
        serve.shutdown() if local else serve.delete(_NAME)


def _reason(error: BaseException) -> str:
    """The last line that says something: of a replica's traceback, its error."""
    from ray import serve

    text = str(error)
    with contextlib.suppress(Exception):
        application = serve.status().applications[_NAME]
        text = "\n".join([application.message, *(one.message for one in application.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "error" in line]
    return (lines or text.strip().splitlines() or [type(error).__name__])[-1][:600]


def _require_free(config: ServeConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        raise ServingError(
            f"can't listen on {config.host}:{config.port} ({error.strerror or error}). Set host and port to others"
        ) from None


@contextlib.contextmanager
def _set(values: dict[str, str]) -> Iterator[None]:
    """Variables of the processes that Ray starts; what the user has set himself wins."""
    mine = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
