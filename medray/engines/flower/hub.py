"""The server's side: a Hub over Flower's Grid."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from medray.engines.flower.parcel import Kind, Parcel, readable
from medray.engines.flower.wire import pack, unpack
from medray.errors import FederationError

__all__ = ["FlowerHub"]

_TYPES = {"query": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
HELLO_SECONDS = 120.0
"""How long a node may take to say which site it is."""
POLL_SECONDS, FIRST_POLL_SECONDS = 1.0, 0.2
"""Between looks for answers, and at first: those of secure aggregation take no training."""
LONGEST_NAME = 100


class FlowerHub:
    """Knows sites by the register of nodes or, without one, by the names that they give themselves.

    Args:
        grid: Flower's.
        register: names of the sites by their nodes' numbers, which Flower's server gave to their keys. Then whoever
            isn't in it is left alone, and an answer is of the node that was asked, whatever it says. None asks each
            node for its name, once: in a simulation all nodes are ours.
    """

    def __init__(self, grid: Grid, register: Mapping[int, str] | None = None) -> None:
        self._grid, self._registered = grid, register is not None
        self._names: dict[int, str] = dict(register or {})

    def sites(self) -> tuple[str, ...]:
        """See :class:`~medray.engines.flower.parcel.Hub`.

        Raises:
            FederationError: two nodes give the same name.
        """
        nodes = set(self._grid.get_node_ids())
        strangers = [] if self._registered else sorted(nodes - self._names.keys())
        if strangers:
            hello = Parcel(text={"ask": "hello"})
            for node, reply in self._exchange("query", dict.fromkeys(strangers, hello), HELLO_SECONDS).items():
                if reply.error is None:
                    self._names[node] = readable(str(reply.text.get("name") or node), LONGEST_NAME)
        present = [self._names[node] for node in nodes if node in self._names]
        twice = sorted({name for name in present if present.count(name) > 1})
        if twice:
            raise FederationError(f"two nodes call themselves {twice[0]!r}. Stop one of them, or rename it")
        return tuple(sorted(present))

    def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
        """See :class:`~medray.engines.flower.parcel.Hub`."""
        nodes = {name: node for node, name in self._names.items()}
        found = self._exchange(kind, {nodes[name]: parcel for name, parcel in parcels.items()}, deadline)
        return {self._names[node]: parcel for node, parcel in found.items()}

    def _exchange(self, kind: Kind, parcels: Mapping[int, Parcel], deadline: float) -> dict[int, Parcel]:
        packed: dict[int, object] = {}  # the same weights go to all: they are written once
        messages: dict[int, Message] = {}
        for node, parcel in parcels.items():
            if id(parcel) not in packed:
                packed[id(parcel)] = pack(parcel)
            content = packed[id(parcel)]
            messages[node] = Message(content, dst_node_id=node, message_type=_TYPES[kind], ttl=10 * deadline + 60)  # type: ignore[arg-type]
        if self._registered:
            return self._answers_by_node(messages, deadline)
        answers: dict[int, Parcel] = {}
        for reply in self._grid.send_and_receive(list(messages.values()), timeout=deadline):
            if reply.metadata.src_node_id in messages:
                answers[reply.metadata.src_node_id] = _read(reply)
        return answers

    def _answers_by_node(self, messages: Mapping[int, Message], deadline: float) -> dict[int, Parcel]:
        """One node's answer at a time, by the number of the question.

        Who wrote an answer stands in the answer itself, where Flower doesn't check it; who may answer a question it
        does. And what one site sent may be such that Flower can't read it.
        """
        began = time.monotonic()
        until = began + deadline
        nodes = list(messages)
        numbers = list(self._grid.push_messages(list(messages.values())))
        # Flower gives them in order, None for one that it didn't take; none at all where all were too large.
        waiting = {name: node for name, node in zip(numbers, nodes, strict=bool(numbers)) if name}
        answers: dict[int, Parcel] = {}
        while waiting and time.monotonic() < until:
            for name, node in list(waiting.items()):
                try:
                    replies = list(self._grid.pull_messages([name]))
                except Exception as error:  # the others' answers may be well
                    answers[node] = Parcel(error=f"an answer that can't be read ({type(error).__name__})")
                    del waiting[name]
                    continue
                if replies:
                    answers[node] = _read(replies[0])
                    del waiting[name]
            if waiting:
                time.sleep(min(POLL_SECONDS, FIRST_POLL_SECONDS + (time.monotonic() - began) / 10))
        return answers


def _read(reply: Message) -> Parcel:
    try:
        return unpack(reply)
    except FederationError as error:
        return Parcel(error=str(error))
