"""Plots of a report, each as an SVG string, in one plain style."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from medray.report.data import Curve, FrontPoint, RobustnessRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, QUIET = "#1d2b36", "#0b6e8f", "#b9c4cc"
COLOURS = ("#0b6e8f", "#d1682c", "#4c8c4a", "#8a4f9e", "#b33a3a", "#7a6a53", "#3f6fbf", "#8c8c2e")


def figure(width: float = 5.2, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; nothing global is touched, so that reports can be written from threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shape = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(shape)
    axes = shape.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    return shape, axes


def plain(text: str) -> str:
    """Text from the data as it shall be read: no formula between dollars, no legend entry hidden by an underscore."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def svg(shape: Figure) -> str:
    """The figure as SVG text to put into a page."""
    buffer = io.StringIO()
    shape.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """(H, W[, 3]) uint8 as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def learning_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], objective: str, direction: Literal["max", "min"]
) -> str:
    """The objective over seconds of training: finalists in colour, trials behind them."""
    shape, axes = figure(7.0, 3.6)
    final = 0
    trials = 0
    for name, points in curves.items():
        if not points:
            continue
        x, y = zip(*points, strict=True)
        if name.startswith("final"):
            axes.plot(x, y, color=COLOURS[final % len(COLOURS)], linewidth=2, label=plain(name), zorder=3)
            final += 1
        else:
            axes.plot(x, y, color=QUIET, linewidth=1, marker=".", markersize=3, label=None if trials else "trials")
            trials += 1
    axes.set_xlabel("seconds of training", fontsize=9)
    axes.set_ylabel(plain(objective), fontsize=9)
    if final or trials:
        axes.legend(fontsize=8, frameon=False)
    _readable_limits(axes, [y for points in curves.values() for _, y in points], direction)
    return svg(shape)


def site_curves(curves: Mapping[str, Sequence[tuple[float, float]]], metric: str) -> str:
    """A metric at each site over rounds."""
    shape, axes = figure(7.0, 3.6)
    for number, (name, points) in enumerate(curves.items()):
        if points:
            x, y = zip(*points, strict=True)
            colour, marker = COLOURS[number % len(COLOURS)], "." if len(points) < 40 else ""
            axes.plot(x, y, color=colour, linewidth=1.5, marker=marker, markersize=4, label=plain(name))
    axes.set_xlabel("rounds", fontsize=9)
    axes.set_ylabel(plain(metric), fontsize=9)
    if 0 < sum(bool(points) for points in curves.values()) <= 12:
        axes.legend(fontsize=8, frameon=False)
    return svg(shape)


def round_bytes(numbers: Sequence[int], down: Sequence[int], up: Sequence[int]) -> str:
    """What went over the wire, round by round, in MB."""
    shape, axes = figure(7.0, 2.2)
    for name, values, colour in (("to the sites", down, COLOURS[0]), ("to the server", up, COLOURS[1])):
        axes.plot(numbers, [value / 1e6 for value in values], color=colour, linewidth=1.5, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rounds", fontsize=9)
    axes.set_ylabel("MB", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return svg(shape)


def _readable_limits(axes: Axes, values: Sequence[float], direction: Literal["max", "min"]) -> None:
    """Leave out the first steps of training, which would press everything else into a line; never the best ones."""
    finite = np.asarray([v for v in values if np.isfinite(v)])
    if finite.size > 8:
        low, high = (float(v) for v in np.percentile(finite, [10, 100] if direction == "max" else [0, 90]))
        span = max(high - low, 1e-3)
        below, above = (0.15, 0.08) if direction == "max" else (0.08, 0.15)
        axes.set_ylim(low - below * span, high + above * span)


def importance(shares: Mapping[str, float]) -> str:
    """Bars, the most important parameter on top."""
    items = sorted(shares.items(), key=lambda item: item[1])
    shape, axes = figure(5.2, 0.5 + 0.32 * len(items))
    axes.barh([plain(name) for name, _ in items], [value for _, value in items], color=ACCENT)
    axes.set_xlabel("share of the objective's variation", fontsize=9)
    return svg(shape)


def trade_off(
    points: Sequence[FrontPoint], axes_names: Sequence[str], directions: Sequence[str], limits: Mapping[str, float]
) -> str:
    """Two objectives of all trials: the front as a line, those that break a limit hollow, the champion as a star.

    Args:
        points: trials and champion.
        axes_names: of (y, x).
        directions: ``max`` or ``min`` of (y, x); only words.
        limits: by name; one on an axis is drawn.
    """
    shape, axes = figure(7.0, 3.8)
    trials = [point for point in points if not point.champion]
    for label, chosen, style in (
        ("trials", [p for p in trials if p.feasible], {"color": QUIET, "marker": "o"}),
        ("break a limit", [p for p in trials if not p.feasible], {"edgecolors": QUIET, "facecolors": "none"}),
    ):
        if chosen:
            axes.scatter([p.x for p in chosen], [p.y for p in chosen], s=28, label=label, **style)  # type: ignore[arg-type]
    front = sorted((p for p in trials if p.on_front), key=lambda p: p.x)
    if front:
        # Between two trials of the front nothing was found that is better than the one before.
        step = "steps-post" if directions[1] == "min" else "steps-pre"
        x, y = [p.x for p in front], [p.y for p in front]
        axes.plot(x, y, color=ACCENT, marker="o", linewidth=1.5, drawstyle=step, label="front")
    for p in front[:12]:
        axes.annotate(
            plain(p.name.removeprefix("trial ")), (p.x, p.y), xytext=(4, 4), textcoords="offset points", size=7
        )
    for p in points:
        if p.champion:
            label = f"champion: {plain(p.name)}"
            axes.scatter([p.x], [p.y], s=150, marker="*", color=COLOURS[1], zorder=4, label=label)
    vertical, horizontal = axes_names
    if horizontal in limits:
        axes.axvline(limits[horizontal], color=COLOURS[4], linewidth=1, linestyle="--", label="limit")
    xs = [p.x for p in points if p.x > 0]
    if xs and len(xs) == len(points) and max(xs) > 20 * min(xs):
        axes.set_xscale("log")
    better = {"max": "more is better", "min": "less is better"}
    axes.set_xlabel(f"{plain(horizontal)} ({better[directions[1]]})", fontsize=9)
    axes.set_ylabel(f"{plain(vertical)} ({better[directions[0]]})", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return svg(shape)


def hypervolume(steps: Sequence[tuple[float, float]]) -> str:
    """The share of the objectives' box that the trials dominate, over the seconds of the search."""
    shape, axes = figure(7.0, 2.4)
    x, y = zip(*steps, strict=True)
    axes.step(x, y, where="post", color=ACCENT, linewidth=1.8)
    axes.set_ylim(0, 1)
    axes.set_xlabel("seconds of search", fontsize=9)
    axes.set_ylabel("hypervolume", fontsize=9)
    return svg(shape)


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    """Counts, shaded by the share of the true class."""
    side = min(9.0, 2.2 + 0.55 * len(classes))
    shape, axes = figure(side + 0.6, side)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        dark = share[row, column] > 0.55
        axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else INK, fontsize=9)
    names = [plain(name) for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    axes.spines[["left", "bottom"]].set_visible(False)
    return svg(shape)


def roc(curves: Sequence[Curve]) -> str:
    """Sensitivity over 1 - specificity."""
    return _unit_square(curves, "1 - specificity", "sensitivity", diagonal=True, area="AUC")


def precision_recall(curves: Sequence[Curve]) -> str:
    """Precision over recall."""
    return _unit_square(curves, "recall (sensitivity)", "precision", diagonal=False, area="AP")


def reliability(curves: Sequence[Curve]) -> str:
    """Share of right answers over confidence."""
    return _unit_square(curves, "confidence", "share that is right", diagonal=True, area="ECE", marker="o")


def _unit_square(
    curves: Sequence[Curve], x: str, y: str, *, diagonal: bool, area: str, marker: str | None = None
) -> str:
    shape, axes = figure(4.0, 3.8)
    if diagonal:
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
    for position, curve in enumerate(curves):
        colour = COLOURS[position % len(COLOURS)]
        keep = np.isfinite(curve.x) & np.isfinite(curve.y)
        label = f"{plain(curve.name)} ({area} {curve.area:.3f})"
        axes.plot(curve.x[keep], curve.y[keep], color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    if curves:
        axes.legend(fontsize=7.5, frameon=False, loc="lower right" if diagonal else "lower left")
    return svg(shape)


def robustness(rows: Sequence[RobustnessRow], metric: str) -> str:
    """The metric over the severity of each corruption; the untouched images at severity 0."""
    shape, axes = figure(5.6, 3.2)
    clean = [row.score.value for row in rows if row.severity == 0]
    for position, name in enumerate(dict.fromkeys(row.corruption for row in rows if row.severity > 0)):
        points = [(row.severity, row.score) for row in rows if row.corruption == name]
        x = [0, *(severity for severity, _ in points)] if clean else [severity for severity, _ in points]
        y = [*clean[:1], *(score.value for _, score in points)]
        axes.plot(
            x, y, color=COLOURS[position % len(COLOURS)], marker="o", markersize=4, label=plain(name.replace("_", " "))
        )
    axes.set_xticks([0, 1, 2, 3], ["none", "mild", "moderate", "strong"])
    axes.set_xlabel("corruption", fontsize=9)
    axes.set_ylabel(plain(metric), fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return svg(shape)


def case_scores(values: Sequence[Any], classes: Sequence[str]) -> str:
    """Dice of every case, a column of dots a class."""
    table = np.asarray(values, dtype=np.float64)
    shape, axes = figure(5.2, 3.2)
    rng = np.random.default_rng(0)
    for position, _name in enumerate(classes):
        column = table[:, position][np.isfinite(table[:, position])]
        jitter = rng.uniform(-0.16, 0.16, column.size)
        axes.scatter(position + jitter, column, s=12, color=COLOURS[position % len(COLOURS)], alpha=0.65, linewidths=0)
        if column.size:
            axes.plot([position - 0.25, position + 0.25], [np.median(column)] * 2, color=INK, linewidth=1.5)
    axes.set_xticks(range(len(classes)), [plain(name) for name in classes])
    axes.set_ylabel("Dice of each case (line: median)", fontsize=9)
    return svg(shape)
