"""medray site: open, budget, audit, limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medray.cli.main import main
from medray.privacy.ledger import Ledger


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medray", "site", *arguments])
    with pytest.raises(SystemExit) as leave:
        main()
    return int(leave.value.code or 0)


def test_a_site_s_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger"
    assert run(monkeypatch, "budget", str(path)) == 2 and "medray site open" in capsys.readouterr().err
    assert run(monkeypatch, "open", str(path), "--epsilon", "10", "--per-year", "9") == 0
    ledger = Ledger(path)
    ledger.settle(ledger.reserve(run="one", history=[(5.0, 1.0, 1)], data="scans/"), steps_done=1)
    ledger.reserve(run="two", history=[(5.0, 1.0, 1)])
    assert run(monkeypatch, "budget", str(path)) == 0
    told = capsys.readouterr().out
    assert "scans/" in told and "not settled: counts in full" in told and "of 10 at delta 1e-05" in told
    assert run(monkeypatch, "limits", str(path), "--epsilon", "2") == 0 and ledger.limits.per_year is None
    assert run(monkeypatch, "renew", str(path)) == 2
    assert run(monkeypatch, "audit", str(path)) == 0 and ledger.head in capsys.readouterr().out
    path.write_text(path.read_text().replace("two", "six"))
    assert run(monkeypatch, "audit", str(path)) == 1 and "line 4 is broken" in capsys.readouterr().out
