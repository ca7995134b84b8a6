"""A federation's server in a process of its own: ``network_server.py FOLDER PORT ADMIN_PORT``."""

from __future__ import annotations

import sys
from pathlib import Path

from medray.workflows.federation.network import serve_federation

if __name__ == "__main__":
    serve_federation(
        Path(sys.argv[1]),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        admin_port=int(sys.argv[3]),
        told=lambda text: print(text, flush=True),
    )
