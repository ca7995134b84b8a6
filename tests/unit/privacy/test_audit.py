from __future__ import annotations

import json
from pathlib import Path

import pytest

from medray.errors import PrivacyError
from medray.privacy.audit import Audit


@pytest.fixture
def log(tmp_path: Path) -> Path:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.write("started", site="a")
    audit.write("asked", kind="train", round=0)
    audit.write("released", bytes=12)
    return tmp_path / "audit.jsonl"


def test_what_was_written_is_read(log: Path) -> None:
    lines = Audit(log).read()
    assert [line.event for line in lines] == ["started", "asked", "released"]
    assert lines[1].about == {"kind": "train", "round": 0}
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("how", ["altered", "removed", "swapped", "inserted", "rewritten"])
def test_every_change_shows_and_names_its_line(log: Path, how: str) -> None:
    lines = log.read_text().splitlines(keepends=True)
    if how == "altered":
        lines[1] = lines[1].replace('"round":0', '"round":1')
    elif how == "removed":
        del lines[1]
    elif how == "swapped":
        lines[0], lines[1] = lines[1], lines[0]
    elif how == "inserted":
        lines.insert(1, lines[1])
    else:  # with a hash that fits its content, but not the line after it
        from medray.privacy.chain import _digest, _encode

        record = json.loads(lines[1])
        del record["hash"]
        record["round"] = 7
        lines[1] = _encode({**record, "hash": _digest(record)}).decode()
    log.write_text("".join(lines))
    number = {"altered": 2, "removed": 2, "swapped": 1, "inserted": 3, "rewritten": 3}[how]
    with pytest.raises(PrivacyError, match=f"line {number} is broken"):
        Audit(log).read()
    with pytest.raises(PrivacyError, match="broken"):
        Audit(log).write("asked")


def test_a_torn_last_line_is_cut_off(log: Path) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"event":"ask')
    assert len(Audit(log).read()) == 3
    Audit(log).write("asked")
    assert len(Audit(log).read()) == 4 and log.read_bytes().startswith(whole)


def test_without_a_place_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrivacyError, match="can't be"):
        Audit(tmp_path / "file" / "audit.jsonl").write("started")
    with pytest.raises(PrivacyError, match="no such file"):
        Audit(tmp_path / "none.jsonl").read()
