"""Sites as Ray actors, by Flower's simulation: several at once, each in a process with a share of the machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from medray.engines.flower.hub import FlowerHub
from medray.engines.flower.parcel import Answer, Hub
from medray.engines.flower.site import client_app
from medray.errors import FederationError

__all__ = ["simulate"]

T = TypeVar("T")


def simulate(open_site: Callable[[int], Answer], sites: int, serve: Callable[[Hub], T], *, cpus: int, gpus: float) -> T:
    """Run ``serve`` with a hub whose sites are Ray actors. Ray must be connected; Flower ends the session.

    Args:
        open_site: a site by number; sent to the actors.
        sites: how many.
        serve: the server's work; in a thread of this process.
        cpus: of one actor; as many actors work at once as fit.
        gpus: of one actor, also a part of one.

    Returns:
        what ``serve`` returned.

    Raises:
        FederationError: Flower ended without the server's answer.
        Exception: whatever ``serve`` raised.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        try:
            results.append(serve(FlowerHub(grid)))
        except BaseException as error:
            errors.append(error)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app=app,
        client_app=client_app(open_site),
        num_supernodes=sites,
        backend_config={"client_resources": {"num_cpus": cpus, "num_gpus": gpus}},
    )
    if errors:
        raise errors[0]
    if not results:
        raise FederationError("Flower's simulation ended before the server did; its log says why")
    return results[0]
