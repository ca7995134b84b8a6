"""``report.html`` of a federation: what a workflow found, shown; nothing is computed here but pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medray.report import plots
from medray.report.data import Interval
from medray.report.render import environment

__all__ = ["AttackRow", "ComparisonRow", "FederationReport", "RoundRow", "SiteRow", "write_federation_report"]


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One site: its cases, the federated model on its test cases, and the other ways to train.

    None stands for numbers of cases that the site didn't tell.
    """

    site: str
    train: int | None
    validation: int | None
    test: int
    score: Interval
    rivals: dict[str, Interval]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One way to train; ``difference``: the federated model minus this one, paired."""

    name: str
    score: Interval
    difference: Interval | None


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round; sites that gave nothing usable are named with the reason."""

    number: int
    ok: int
    late: tuple[str, ...]
    failed: tuple[str, ...]
    quarantined: tuple[str, ...]
    attempts: int
    seconds: float
    down: int = field(metadata={"unit": "bytes to the sites"})
    up: int = field(metadata={"unit": "bytes from the sites"})
    discarded: str | None = None

    @property
    def trouble(self) -> bool:
        """Whether a site is named, or the round moved nothing."""
        return bool(self.late or self.failed or self.quarantined or self.discarded)


@dataclass(frozen=True, kw_only=True)
class AttackRow:
    """What the loss attack found of who was in a model's training.

    Attributes:
        model: which.
        auc: members against others; .5 is guessing.
        found: share of members found, where ``false_positives`` of the others are taken for members.
        members, others: cases of either kind.
        most: what no attack can find more than, by the training's epsilon; None without one.
    """

    model: str
    auc: Interval
    found: Interval
    false_positives: float
    members: int
    others: int
    most: float | None


@dataclass(frozen=True, kw_only=True)
class FederationReport:
    """All of the page."""

    name: str
    headline: str
    intended_use: str
    created: str
    metric: str
    measured_on: str
    metrics: dict[str, Interval]
    comparison: tuple[ComparisonRow, ...]
    sites: tuple[SiteRow, ...]
    matrix: dict[str, tuple[float, ...]] = field(metadata={"rows": "a model's metric at each site, in their order"})
    curves: dict[str, tuple[tuple[float, float], ...]] = field(metadata={"points": "round, metric"})
    rounds: tuple[RoundRow, ...]
    best_round: int
    settings: dict[str, str]
    protection: str
    reproduce: dict[str, str]
    attacks: tuple[AttackRow, ...] = ()


def write_federation_report(data: FederationReport, path: Path) -> Path:
    """Render ``data`` to ``path`` (UTF-8, appears whole or not at all)."""
    from markupsafe import Markup

    rows = data.rounds
    wire = plots.round_bytes([row.number for row in rows], [row.down for row in rows], [row.up for row in rows])
    drawn = {"curves": Markup(plots.site_curves(data.curves, data.metric)), "bytes": Markup(wire)}
    text = environment().get_template("federation.html.j2").render(data=data, plots=drawn, zip=zip)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
