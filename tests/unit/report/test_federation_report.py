"""The page of a federation shows what it was handed, and nothing of it is trusted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from medray.report.data import Interval
from medray.report.federation import (
    AttackRow,
    ComparisonRow,
    FederationReport,
    RoundRow,
    SiteRow,
    write_federation_report,
)

SCORE = Interval(value=0.8, low=0.7, high=0.9)


def report(**changes: Any) -> FederationReport:
    quiet: dict[str, Any] = {"attempts": 1, "seconds": 1.0, "down": 2_000_000, "up": 1_000_000}
    none: dict[str, Any] = {"late": (), "failed": (), "quarantined": ()}
    fields: dict[str, Any] = {
        "name": "lungs",
        "headline": "fedavg over 2 sites",
        "intended_use": "Research use only.",
        "created": "2026-01-01",
        "metric": "auc",
        "measured_on": "test",
        "metrics": {"auc": SCORE},
        "comparison": (
            ComparisonRow(name="federated", score=SCORE, difference=None),
            ComparisonRow(name="pooled", score=SCORE, difference=Interval(value=-0.01, low=-0.05, high=0.02)),
        ),
        "sites": (
            SiteRow(site="kiel", train=9, validation=2, test=0, score=Interval(value=math.nan), rivals={}),
            SiteRow(site="bonn", train=9, validation=2, test=3, score=SCORE, rivals={"pooled": SCORE}),
        ),
        "matrix": {"federated": (math.nan, 0.8)},
        "curves": {"kiel": ((0.0, 0.5), (1.0, 0.7)), "bonn": ()},
        "rounds": (
            RoundRow(number=1, ok=2, **none, **quiet),
            RoundRow(number=2, ok=1, **{**none, "quarantined": ("bonn: NaN",)}, **quiet),
        ),
        "best_round": 2,
        "settings": {"Strategy": "fedavg"},
        "protection": "none at all",
        "reproduce": {"Command": "medray federate simulate"},
    }
    return FederationReport(**{**fields, **changes})


def test_sites_rounds_and_comparison_are_shown(tmp_path: Path) -> None:
    page = write_federation_report(report(), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "bonn: NaN" in page and "4.00 MB to the sites" in page and "-0.010 (-0.050 to 0.020)" in page
    assert page.count("<svg") == 2 and "none at all" in page and "–" in page
    quiet = write_federation_report(report(rounds=report().rounds[:1]), tmp_path / "quiet.html").read_text("utf-8")
    assert "No site was late" in quiet
    lost = RoundRow(
        number=1,
        ok=2,
        late=(),
        failed=(),
        quarantined=(),
        attempts=1,
        seconds=1.0,
        down=1,
        up=1,
        discarded="2 of 4 sites <left>",
    )
    page = write_federation_report(report(rounds=(lost,)), tmp_path / "lost.html").read_text("utf-8")
    assert "2 of 4 sites &lt;left&gt;" in page and "gives away" not in page
    row = AttackRow(model="federated", auc=SCORE, found=SCORE, false_positives=0.1, members=9, others=8, most=0.27)
    page = write_federation_report(report(attacks=(row,)), tmp_path / "attack.html").read_text("utf-8")
    assert "What the model gives away" in page and "at 10 % false" in page and "0.270" in page


def test_what_a_site_calls_itself_is_escaped(tmp_path: Path) -> None:
    bad = SiteRow(site="<script>x</script>", train=1, validation=1, test=1, score=SCORE, rivals={})
    changes: dict[str, Any] = {"sites": (bad,), "curves": {"$\\frac<b>": ((0.0, 1.0),)}, "matrix": {"<i>": (0.5,)}}
    page = write_federation_report(report(**changes), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<i>" not in page and "&lt;script&gt;" in page
