"""The server's app: Flower's ServerApp around what leads a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from medray.engines.flower.hub import FlowerHub
from medray.engines.flower.parcel import HubOf

__all__ = ["server_app"]

Lead = Callable[[HubOf, Mapping[str, object]], None]
"""Leads one run to its end, with what makes a hub to the sites, and the run's configuration."""


def server_app(lead: Lead) -> ServerApp:
    """The app that the server executes for a run."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        lead(lambda register: FlowerHub(grid, register), dict(context.run_config))

    return app
