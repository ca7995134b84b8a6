"""A Grid within this process: the ClientApp is called, one site after the other. For small models and for tests.

A site that takes longer than the deadline is late, as it would be over a network; but nothing can stop it, so that all
wait for it. Nothing leaves the process, and everything is written and read as if it did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from medray.engines.flower.hub import FlowerHub
from medray.engines.flower.parcel import Answer, Hub
from medray.engines.flower.site import client_app

__all__ = ["InProcessGrid", "in_process"]

_SERVER = 1


class InProcessGrid(Grid):
    """``sites`` nodes, numbered from 2, that all run ``app``."""

    def __init__(self, app: ClientApp, sites: int) -> None:
        self._app, self._run = app, Run.create_empty(1)
        # Messages ask who they are from; a real app is told by Flower, one process at a time.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, _SERVER
        self._contexts: dict[int, Context] = {}
        for number in range(sites):
            config: Any = {"partition-id": number, "num-partitions": sites}
            self._contexts[number + 2] = Context(1, number + 2, config, RecordDict(), {})  # type: ignore[arg-type]
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Flower's own bookkeeping; there is one run here."""
        self._run = run

    @property
    def run(self) -> Run:
        """The one run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each answered at once; :meth:`pull_messages` gives the replies."""
        ids = []
        for message in messages:
            self._sent += 1
            ids.append(str(self._sent))
            self._replies[ids[-1]] = self._app(message, self._contexts[message.metadata.dst_node_id])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to messages, each once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies of the sites that took less than ``timeout`` seconds each, as if they had worked side by side."""
        found = []
        for message in messages:
            began = time.monotonic()
            reply = list(self.pull_messages(self.push_messages([message])))
            if timeout is None or time.monotonic() - began <= timeout:
                found += reply
        return found


def in_process(open_site: Callable[[int], Answer], sites: int) -> Hub:
    """A hub whose sites live in this process."""
    return FlowerHub(InProcessGrid(client_app(open_site), sites))
