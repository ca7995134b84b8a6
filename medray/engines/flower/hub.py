"""The server's side: a Hub over Flower's Grid."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from medray.engines.flower.parcel import Kind, Parcel
from medray.engines.flower.wire import pack, unpack
from medray.errors import FederationError

__all__ = ["FlowerHub"]

_TYPES = {"query": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}
HELLO_SECONDS = 120.0
"""How long a node may take to say which site it is."""


class FlowerHub:
    """Knows sites by the names that they give themselves; asks a node's name once."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}

    def sites(self) -> tuple[str, ...]:
        """See :class:`~medray.engines.flower.parcel.Hub`.

        Raises:
            FederationError: two nodes give the same name.
        """
        nodes = set(self._grid.get_node_ids())
        strangers = sorted(nodes - self._names.keys())
        if strangers:
            hello = Parcel(text={"ask": "hello"})
            for node, reply in self._exchange("query", dict.fromkeys(strangers, hello), HELLO_SECONDS).items():
                if reply.error is None:
                    self._names[node] = str(reply.text.get("name") or node)
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
        messages = []
        for node, parcel in parcels.items():
            if id(parcel) not in packed:
                packed[id(parcel)] = pack(parcel)
            content = packed[id(parcel)]
            messages.append(Message(content, dst_node_id=node, message_type=_TYPES[kind], ttl=10 * deadline + 60))  # type: ignore[arg-type]
        answers: dict[int, Parcel] = {}
        for reply in self._grid.send_and_receive(messages, timeout=deadline):
            try:
                answers[reply.metadata.src_node_id] = unpack(reply)
            except FederationError as error:
                answers[reply.metadata.src_node_id] = Parcel(error=str(error))
        return answers
