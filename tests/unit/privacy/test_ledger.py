"""The ledger: what it refuses, what it survives, and that it never shows less than was spent."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.budget import cheap, scenario
from medray.errors import PrivacyError
from medray.privacy.ledger import Ledger, Limits

EXAMPLES = int(os.environ.get("MEDRAY_LEDGER_EXAMPLES", "300"))
"""10,000 are ``python -m benchmarks budget``."""


def book(folder: Path, **limits: float) -> Ledger:
    return Ledger.create(folder / "ledger.jsonl", Limits(**{"epsilon": 10.0, "delta": 1e-5, **limits}), compose=cheap)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_history_of_runs_crashes_and_clocks_shows_less_than_was_spent(data: st.DataObject) -> None:
    def choose(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    with tempfile.TemporaryDirectory() as folder:
        assert scenario(choose, Path(folder)) is None


def test_reserved_counts_until_it_is_settled(tmp_path: Path) -> None:
    ledger = book(tmp_path)
    first = ledger.reserve(run="a", history=[(1.0, 1.0, 6), (2.0, 1.0, 4)], data="d")
    assert ledger.spent().epsilon == pytest.approx(7.0) and ledger.remaining() == pytest.approx(3.0)
    with pytest.raises(PrivacyError, match=r"'b' would bring epsilon to 11 .* allows 10 ever, of which 7 is spent"):
        ledger.reserve(run="b", history=[(1.0, 1.0, 4)])
    ledger.settle(first, steps_done=[1, 4])
    assert ledger.spent().epsilon == pytest.approx(2.0)
    ledger.settle(first, steps_done=[1, 4])
    with pytest.raises(PrivacyError, match="settled otherwise"):
        ledger.settle(first, steps_done=[0, 4])
    ledger.reserve(run="b", history=[(1.0, 1.0, 4)])
    assert Ledger(ledger.path, compose=cheap).spent().epsilon == pytest.approx(6.0)


def test_more_steps_than_were_reserved_are_not_taken(tmp_path: Path) -> None:
    ledger = book(tmp_path)
    reservation = ledger.reserve(run="a", history=[(1.0, 1.0, 6)])
    with pytest.raises(PrivacyError, match=r"reserved \[6\] steps and settles \[7\]"):
        ledger.settle(reservation, steps_done=7)
    assert ledger.find(reservation.id) == reservation
    with pytest.raises(PrivacyError, match="reserves nothing"):
        ledger.reserve(run="a", history=[])


def test_limits_of_a_run_and_a_year(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime as dt

    now = [dt.datetime(2030, 1, 1, tzinfo=dt.UTC)]
    monkeypatch.setattr("medray.privacy.ledger._now", lambda: now[0])
    ledger = book(tmp_path, per_run=3.0, per_year=4.0)
    with pytest.raises(PrivacyError, match="allows 3 a run"):
        ledger.reserve(run="a", history=[(1.0, 1.0, 4)])
    ledger.reserve(run="a", history=[(1.0, 1.0, 3)])
    now[0] += dt.timedelta(days=4000)
    with pytest.raises(PrivacyError, match="allows 4 a year"):
        ledger.reserve(run="b", history=[(1.0, 1.0, 2)])
    ledger.renew(by="a person")
    ledger.reserve(run="b", history=[(1.0, 1.0, 2)])
    assert ledger.spent().epsilon == pytest.approx(5.0)
    assert ledger.spent(this_year=True).epsilon == pytest.approx(2.0)
    now[0] -= dt.timedelta(days=4000)
    with pytest.raises(PrivacyError, match="can be opened after 365"):
        ledger.renew(by="a person")
    ledger.set_limits(Limits(epsilon=5.5, delta=1e-5), by="a person")
    with pytest.raises(PrivacyError, match=r"allows 5\.5 ever"):
        ledger.reserve(run="c", history=[(1.0, 1.0, 1)])


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_changed_line_is_named_and_stops_everything(tmp_path: Path, line: int) -> None:
    ledger = book(tmp_path)
    ledger.settle(ledger.reserve(run="a", history=[(1.0, 1.0, 6)]), steps_done=6)
    assert ledger.verify() is None
    lines = ledger.path.read_text().splitlines(keepends=True)
    lines[line] = lines[line].replace("1", "2", 1)
    ledger.path.write_text("".join(lines))
    assert f"line {line + 1} is broken" in str(ledger.verify())
    with pytest.raises(PrivacyError, match=f"line {line + 1} is broken"):
        ledger.reserve(run="b", history=[(1.0, 1.0, 1)])


def test_a_line_taken_out_or_repeated_is_seen(tmp_path: Path) -> None:
    ledger = book(tmp_path)
    for name in "ab":
        ledger.reserve(run=name, history=[(1.0, 1.0, 1)])
    lines = ledger.path.read_text().splitlines(keepends=True)
    for broken in (
        [lines[0], lines[2]],
        [*lines, lines[2]],
        lines[1:],
        [*lines, "null\n"],
        [*lines, "[" * 5000 + "\n"],
    ):
        ledger.path.write_text("".join(broken))
        assert "is broken" in str(ledger.verify())
    head = ledger.path.write_text("".join(lines)) and ledger.head
    ledger.path.write_text("".join(lines[:2]))  # cut short: a whole ledger, but not the one whose head was kept
    assert ledger.verify() is None and ledger.head != head


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    ledger = book(tmp_path)
    ledger.reserve(run="a", history=[(1.0, 1.0, 6)])
    with ledger.path.open("ab") as file:
        file.write(b'{"kind":"settle","id"')
    assert ledger.verify() is None and ledger.spent().epsilon == pytest.approx(6.0)
    ledger.reserve(run="b", history=[(1.0, 1.0, 1)])
    assert ledger.verify() is None and len(ledger.entries()) == 2


def test_runs_at_once_share_it(tmp_path: Path) -> None:
    ledger = book(tmp_path)

    def one(number: int) -> bool:
        try:
            Ledger(ledger.path, compose=cheap).reserve(run=str(number), history=[(1.0, 1.0, 1)])
        except PrivacyError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        allowed = sum(pool.map(one, range(30)))
    assert allowed == 10 and ledger.remaining() == 0 and ledger.verify() is None


def test_it_is_never_begun_anew_and_never_by_chance(tmp_path: Path) -> None:
    ledger = book(tmp_path)
    with pytest.raises(PrivacyError, match="never begun anew"):
        book(tmp_path)
    assert ledger.path.stat().st_mode & 0o077 == 0
    with pytest.raises(PrivacyError, match="there is no ledger"):
        Ledger(tmp_path / "other").reserve(run="a", history=[(1.0, 1.0, 1)])
    for wrong in ({"epsilon": float("inf")}, {"delta": 1.0}, {"per_run": -1.0}):
        with pytest.raises(PrivacyError):
            Limits(**{"epsilon": 1.0, "delta": 1e-5, **wrong})
