"""A site's side: Flower's ClientApp around what the site does."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from medray.engines.flower.parcel import Answer, Kind, Parcel
from medray.engines.flower.wire import pack, unpack
from medray.errors import MedrayError

__all__ = ["client_app"]


def client_app(open_site: Callable[[int], Answer]) -> ClientApp:
    """The app that a site runs.

    Args:
        open_site: of the site's number (a simulation's ``partition-id``; 0 without), picklable by value.
    """
    app = ClientApp()

    def respond(kind: Kind, message: Message, context: Context) -> Message:
        try:
            answer = open_site(int(context.node_config.get("partition-id", 0)))
            reply = answer(kind, unpack(message))
        except MedrayError as error:
            reply = Parcel(error=str(error))
        except Exception as error:  # whatever happens at one site, the server shall read why
            reply = Parcel(error=f"{type(error).__name__}: {error}")
        return Message(pack(reply), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return respond("train", message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return respond("evaluate", message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return respond("query", message, context)

    return app
