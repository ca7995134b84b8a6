"""What Flower starts for a run. The server executes this; a site never does: it runs what is installed there."""

from __future__ import annotations

from medray.engines.flower.apps import server_app
from medray.engines.flower.parcel import Answer
from medray.engines.flower.site import client_app
from medray.errors import FederationError
from medray.workflows.federation.leading import lead


def _no_site(_: int) -> Answer:
    raise FederationError(
        "a site is no Flower SuperNode: start it with medray federate site site.yaml. To try a federation on one "
        "machine: medray federate simulate"
    )


server = server_app(lead)
client = client_app(_no_site)
