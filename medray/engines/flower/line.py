"""A site's end of the line: fetch work from the server, have it answered here, send the answer.

Flower's own SuperNode fetches the app bundle of a run and executes the code in it. This loop speaks the same protocol
and never asks for that bundle: whatever a run is made of, a site executes what is installed on it and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medray.errors import FederationError, MedrayError

if TYPE_CHECKING:
    from flwr.app import Context, Message

Answer = Callable[["Message", "Context"], "Message"]
"""Does what a message asks for, and replies to it. A MedrayError is sent back as an error that names its reason."""

POLL_SECONDS = 3.0
LIVELY_POLL_SECONDS, LIVELY_SECONDS = 0.5, 15.0
"""Between questions for work, for a while after some: a round of secure aggregation has five messages."""
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """How a site reaches its server.

    Attributes:
        host, port: of the server.
        ca: the authority's certificate, PEM.
        key: the site's private key, OpenSSH's format.
    """

    host: str
    port: int
    ca: Path
    key: Path


def check_server(line: Line) -> dt.datetime:
    """Shake hands with the server as any TLS client would; when its certificate runs out, UTC.

    Raises:
        FederationError: unreachable, no TLS, or a certificate that this federation's authority doesn't vouch for.
    """
    where = f"{line.host}:{line.port}"
    try:
        context = ssl.create_default_context(cafile=str(line.ca))
    except (OSError, ssl.SSLError) as error:
        raise FederationError(f"{line.ca}: no certificate ({error}). Take ca.crt from the start-up kit") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        with (
            socket.create_connection((line.host, line.port), timeout=_HANDSHAKE_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=line.host) as tls,
        ):
            shown = tls.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"{where}: its certificate is refused: {error.verify_message}. Tell the federation's organiser; until then "
            "nothing is sent there"
        ) from None
    except ssl.SSLError as error:
        raise FederationError(f"{where}: speaks no TLS ({error.reason}). Nothing is sent unprotected") from None
    except OSError as error:
        raise FederationError(
            f"{where}: can't be reached ({error.strerror or error}). Is the server up, and may this machine connect?"
        ) from None
    return dt.datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), dt.UTC)


def attend(
    line: Line,
    answer: Answer,
    *,
    stop: Callable[[], bool] = lambda: False,
    told: Callable[[str], None] = lambda _: None,
    poll: float = POLL_SECONDS,
) -> None:
    """Answer messages until ``stop``; while the server is away, wait for it.

    Args:
        line: to the server.
        answer: called with one message at a time.
        stop: asked between messages.
        told: hears of what happens, in a line.
        poll: seconds between questions for work.

    Raises:
        FederationError: the server refuses this site's key, or can't be trusted.
    """
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.common.constant import ErrorCode

    states: dict[int, RecordDict] = {}

    def respond(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except MedrayError as error:
            reason = str(error)
        except Exception as error:  # a defect met by one message must not cost a site its place in the federation
            reason = f"{type(error).__name__} at the site; its own log says more"
            told(f"{type(error).__name__}: {error}")
        return Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)

    while not stop():
        with _connection(line) as (node, receive, send, get_run, _, pull, push, confirm):
            told(f"connected to {line.host}:{line.port} as node {node}")
            busy = time.monotonic()
            while not stop():
                try:
                    got = receive()
                    if got is None:
                        lively = time.monotonic() - busy < LIVELY_SECONDS
                        time.sleep(min(poll, LIVELY_POLL_SECONDS) if lively else poll)
                        continue
                    message = _fetch(*got, node=node, pull=pull, confirm=confirm)
                    run = message.metadata.run_id
                    context = Context(
                        run_id=run,
                        node_id=node,
                        node_config={},
                        state=states.setdefault(run, RecordDict()),
                        run_config=dict(get_run(run).override_config),
                    )
                    begun = time.monotonic()
                    reply = respond(message, context)
                    _send(reply, seconds=time.monotonic() - begun, send=send, push=push)
                    busy = time.monotonic()
                except Exception as error:  # the server is busy, restarting, or has ended the run meanwhile
                    told(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; connecting anew")
                    break
        if not stop():
            time.sleep(poll)


@contextlib.contextmanager
def _connection(line: Line) -> Iterator[Any]:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supernode import fleet_http_connection as flower

    def refused(_: int, message: str = "", *__: Any, **___: Any) -> None:
        raise FederationError(
            f"{line.host}:{line.port}: refuses this site's key. It has expired, was replaced or taken out: ask the "
            f"organiser for a new start-up kit. ({message.splitlines()[-1] if message else 'no reason given'})"
        )

    try:
        private: Any = load_ssh_private_key(line.key.read_bytes(), None)
    except OSError as error:
        raise FederationError(f"{line.key}: {error.strerror}. Take node.key from the start-up kit") from None
    except Exception:
        raise FederationError(f"{line.key}: no OpenSSH private key. Take node.key from the start-up kit") from None
    address = f"[{line.host}]:{line.port}" if ":" in line.host else f"{line.host}:{line.port}"
    # Flower ends the whole process where a server doesn't take a node; here that is an error like any other.
    before, flower.flwr_exit = flower.flwr_exit, refused
    try:
        keys = (private, private.public_key())
        with flower.http_request_response(address, False, line.ca.read_bytes(), keys) as callbacks:
            yield callbacks
    finally:
        flower.flwr_exit = before


def _fetch(message: Any, tree: Any, *, node: int, pull: Any, confirm: Any) -> Message:
    from flwr.app import Message
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
    from flwr.supercore.task_identity import TaskIdentity

    run = message.metadata.run_id
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, 0
    whole = pull_and_inflate_object_from_tree(
        tree,
        lambda object_id: pull(run, object_id),
        lambda object_id: confirm(run, object_id),
        return_type=Message,
    )
    # What was deflated doesn't hold its own number.
    whole.metadata.__dict__["_message_id"] = tree.object_id
    return whole


def _send(reply: Any, *, seconds: float, send: Any, push: Any) -> None:
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )

    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        wanted, session = send(reply, get_object_tree(reply), seconds)
        objects = get_all_nested_objects(reply)
        for object_id in wanted:
            push(reply.metadata.run_id, session, object_id, objects[object_id].deflate())
