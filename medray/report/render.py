"""``report.html``: one self-contained file, for a physician and an engineer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from medray.report import plots
from medray.report.cells import draw_cells
from medray.report.data import Interval, ReportData, TrialRow

LONGEST = 48
"""Characters of a hyper-parameter in a table; a genotype's name is longer, and stands whole in its experiment.yaml."""


def write_report(data: ReportData, path: Path) -> Path:
    """Render ``data`` to ``path`` (UTF-8, appears whole or not at all)."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(render(data), encoding="utf-8")
    partial.replace(path)
    return path


def render(data: ReportData) -> str:
    """The page. Everything that comes from the data is escaped; there are no scripts and nothing is loaded."""
    template = environment().get_template("report.html.j2")
    return template.render(data=data, plots=_plots(data), png=plots.png, trials=_by_value(data), zip=zip)


def environment() -> Any:
    """Of all pages' templates; whatever comes from the data is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("medray.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["figure"] = figure
    found.filters["interval"] = interval
    found.filters["duration"] = duration
    found.filters["value"] = value
    found.filters["brief"] = brief
    return found


def _by_value(data: ReportData) -> list[TrialRow]:
    """The leaderboard: completed trials, best first, then pruned ones, then the rest."""
    sign = -1.0 if data.study.direction == "max" else 1.0
    order = {"completed": 0, "pruned": 1, "running": 2, "failed": 3}

    def key(row: TrialRow) -> tuple[int, float]:
        found = row.values.get(data.study.objective, math.nan)
        return order[row.state], sign * found if math.isfinite(found) else math.inf

    return sorted(data.study.trials, key=key)


def _plots(data: ReportData) -> dict[str, Any]:
    """SVG by name; made from arrays alone, so that they are safe to insert."""
    from markupsafe import Markup

    found: dict[str, str] = {}
    if data.study.curves:
        found["curves"] = plots.learning_curves(data.study.curves, data.study.objective, data.study.direction)
    if data.study.importance:
        found["importance"] = plots.importance(data.study.importance)
    if data.selection is not None:
        chosen = data.selection
        if len(chosen.points) > 1:
            found["trade_off"] = plots.trade_off(chosen.points, chosen.axes, chosen.directions, chosen.limits)
        if len(chosen.hypervolume) > 1:
            found["hypervolume"] = plots.hypervolume(chosen.hypervolume)
    if data.robustness:
        found["robustness"] = plots.robustness(data.robustness, data.gain.metric)
    if data.classification is not None:
        result = data.classification
        if result.confusion is not None:
            found["confusion"] = plots.confusion(result.confusion, data.data.classes)
        found["roc"] = plots.roc(result.roc)
        found["pr"] = plots.precision_recall(result.pr)
        found["reliability"] = plots.reliability(result.reliability)
    if data.segmentation is not None:
        found["cases"] = plots.case_scores([row.dice for row in data.segmentation.cases], data.data.classes[1:])
    if data.architecture is not None:
        found["cells"] = draw_cells(data.architecture.genotype)
    return {name: Markup(text) for name, text in found.items()}


def figure(number: float, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if number is None or not math.isfinite(number) else f"{number:.{digits}f}"


def interval(found: Interval, digits: int = 3) -> str:
    """``0.874 (0.851 to 0.893)``."""
    if not math.isfinite(found.low):
        return figure(found.value, digits)
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def brief(found: Interval) -> str:
    """An interval of any size in four digits: ``41.23 (40.1 to 43)``; counts without one."""
    if not math.isfinite(found.value):
        return "–"
    text = f"{found.value:,.0f}" if abs(found.value) >= 10_000 else f"{found.value:.4g}"
    if not math.isfinite(found.low) or found.low == found.high:
        return text
    return f"{text} ({found.low:.4g} to {found.high:.4g})"


def duration(seconds: float) -> str:
    """``42 s``, ``17 min 5 s``, ``2 h 3 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def value(thing: object) -> str:
    """A hyper-parameter as a person would write it."""
    text = f"{thing:.4g}" if isinstance(thing, float) else str(thing)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
