"""API keys: hashed at rest, scoped, rotated while the server runs."""

from __future__ import annotations

import base64
import json
import stat
import threading
from pathlib import Path

import pytest

from medray.engines.ray.serve import keys
from medray.engines.ray.serve.keys import KeyRing, add_key, from_headers, load_keys, revoke_key
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import ServingError


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_COST", 2)


def status(ring: KeyRing, text: str | None, scope: str = "predict") -> int:
    try:
        ring.who(text, scope)
    except RefusedError as error:
        return error.status
    return 200


def test_a_key_opens_what_it_may_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "pacs", ("predict",))
    ring = KeyRing(path)
    assert ring.who(key, "predict").name == "pacs"
    assert status(ring, key, "admin") == 403
    assert [status(ring, text) for text in (None, "", key[:-1], key + "x", "medray_" + "0" * 12 + "_x", "ä" * 50)] == [
        401
    ] * 6
    assert status(ring, key) == 200  # the wrong ones did not lock it out


def test_the_file_holds_no_secret_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "pacs", ("predict",))
    assert key.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_change_while_the_ring_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = add_key(path, "old", ("predict",))
    ring = KeyRing(path)
    assert status(ring, first) == 200
    second = add_key(path, "new", ("predict",))
    assert revoke_key(path, "old") == 1
    ring.refresh()
    assert status(ring, first) == 401 and status(ring, second) == 200


def test_a_damaged_file_leaves_the_former_keys_in_force_and_says_so(tmp_path: Path) -> None:
    path, told = tmp_path / "keys.json", []
    key = add_key(path, "pacs", ("predict",))
    ring = KeyRing(path, told.append)
    path.write_text('{"keys": [{"id": 3}]}')
    ring.refresh()
    assert status(ring, key) == 200 and len(told) == 1
    with pytest.raises(ServingError, match=r"keys\.0"):
        load_keys(path)


def test_an_expired_key_is_none(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "pacs", ("predict",), days=1)
    document = json.loads(path.read_text())
    document["keys"][0]["expires"] = "2020-01-01T00:00:00Z"
    path.write_text(json.dumps(document))
    assert status(KeyRing(path), key) == 401


def test_headers_that_carry_a_key() -> None:
    basic = "Basic " + base64.b64encode(b"user:secret").decode()
    assert from_headers("Bearer secret", None) == from_headers(None, "secret") == from_headers(basic, None) == "secret"
    assert from_headers("Digest x", None) is None and from_headers("Basic ?", None) is None


def test_names_scopes_and_what_is_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(ServingError, match="no such file"):
        KeyRing(path)
    with pytest.raises(ServingError, match="name"):
        add_key(path, "a b", ("predict",))
    add_key(path, "pacs", ("predict",))
    with pytest.raises(ServingError, match="no key 'other'"):
        revoke_key(path, "other")


def test_of_keys_that_are_added_at_once_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=add_key, args=(path, f"k{n}", ("predict",))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in load_keys(path)} == {f"k{n}" for n in range(8)}


def test_an_end_without_a_zone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "pacs", ("predict",), days=1)
    document = json.loads(path.read_text())
    document["keys"][0]["expires"] = "2020-01-01T00:00:00"
    path.write_text(json.dumps(document))
    with pytest.raises(ServingError, match=r"expires.*timezone"):
        load_keys(path)


def test_guesses_push_no_right_key_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "pacs", ("predict",))
    monkeypatch.setattr(keys, "_REMEMBERED", 2)
    ring = KeyRing(path)
    assert status(ring, key) == 200
    assert {status(ring, f"{key}{n}") for n in range(4)} == {401}
    monkeypatch.setattr(keys, "_hash", lambda *_: pytest.fail("it is remembered"))
    assert status(ring, key) == 200
