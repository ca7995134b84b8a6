"""The server's hub against sites that lie: about who they are, and in what they send."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from medray.engines.flower import hub as hubs
from medray.engines.flower.hub import FlowerHub
from medray.engines.flower.inprocess import in_process
from medray.engines.flower.parcel import Kind, Parcel, readable
from medray.engines.flower.wire import pack, unpack
from medray.errors import FederationError


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages ask who they are from."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, w=np.zeros(2))
    return file.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def hostile(data: bytes, text: str = '{"text": {}, "error": null}') -> RecordDict:
    array = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)
    return RecordDict({"medray": ConfigRecord({"json": text}), "arrays": ArrayRecord({"w": array})})


WHOLE = header("(0,)")
BAD = {
    "empty": hostile(b""),
    "a broken archive": hostile(b"PK\x03\x04 and no more"),
    "an archive": hostile(archive()),
    "more than any memory": hostile(header(f"({1 << 50},)")),
    "a deep text": hostile(WHOLE, '{"error": null, "text": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a text that is none": hostile(WHOLE, "[]"),
    "no arrays": RecordDict({"medray": ConfigRecord({"json": json.dumps({"text": {}, "error": None})})}),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_arrives_is_a_parcel_or_refused(name: str) -> None:
    with pytest.raises(FederationError, match="none of medray's"):
        unpack(Message(BAD[name], dst_node_id=1, message_type="train"))


class Reply:
    """A reply as Flower hands it over: its content, and the node that it says it is from."""

    def __init__(self, content: RecordDict, node: int) -> None:
        self.content, self.metadata = content, type("Metadata", (), {"src_node_id": node})()

    def has_error(self) -> bool:
        return False


class FakeGrid:
    """Nodes 7, 8 and 9; the number of a question is that of its node, as a word."""

    def __init__(self, replies: dict[str, Any]) -> None:
        self.replies, self.pushed = replies, 0

    def get_node_ids(self) -> Iterable[int]:
        return [7, 8, 9]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        self.pushed += 1
        return [str(message.metadata.dst_node_id) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        (name,) = message_ids
        reply = self.replies.get(name)
        if isinstance(reply, Exception):
            raise reply
        return [] if reply is None else [reply]


def answer(text: str) -> RecordDict:
    return pack(Parcel(text={"name": text}, arrays={"w": np.ones(2, np.float32)}))


def registered(replies: dict[str, Any], names: dict[int, str]) -> tuple[FlowerHub, FakeGrid]:
    grid: Any = FakeGrid(replies)
    return FlowerHub(grid, names), grid


def test_a_registered_site_is_who_its_key_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "POLL_SECONDS", 0.01)
    # 8 says that it is node 7, and calls itself by another's name; 9 is nobody's.
    replies = {"7": Reply(answer("kiel"), 7), "8": Reply(answer("kiel"), 7)}
    hub, grid = registered(replies, {7: "kiel", 8: "jena", 5: "away"})
    assert hub.sites() == ("jena", "kiel") and grid.pushed == 0, "nobody is asked for a name"
    found = hub.ask("train", dict.fromkeys(("jena", "kiel"), Parcel()), 5.0)
    assert found.keys() == {"jena", "kiel"} and found["jena"].text == {"name": "kiel"}


@pytest.mark.parametrize("bad", [*BAD, "what Flower can't read"])
def test_one_bad_answer_costs_the_others_nothing(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "POLL_SECONDS", 0.01)
    sent = Reply(BAD[bad], 8) if bad in BAD else RuntimeError("unexpected content")
    hub, _ = registered({"7": Reply(answer("a"), 7), "8": sent}, {7: "kiel", 8: "jena", 9: "bonn"})
    found = hub.ask("train", dict.fromkeys(("bonn", "jena", "kiel"), Parcel()), 0.1)
    assert found.keys() == {"jena", "kiel"}, "bonn is late"
    assert found["kiel"].error is None and np.array_equal(found["kiel"].arrays["w"], [1, 1])
    assert found["jena"].error is not None


def test_names_that_sites_give_themselves_are_fit_for_a_log() -> None:
    def named(number: int) -> Any:
        def site(kind: Kind, parcel: Parcel) -> Parcel:
            return Parcel(text={"name": f"{number}\n2026 all is well\x1b[2J" + "x" * 500})

        return site

    (name,) = in_process(named, 1).sites()
    assert len(name) == 100 and name.startswith("0 2026 all is well [2J")
    assert readable("a\u2028b\r\nc", 5) == "a b  "
