"""A picture of a genotype's cells: SVG by hand, self-contained, with nothing in it but what the grammar allows."""

from __future__ import annotations

from medray.config.genotype import Genotype
from medray.report.plots import COLOURS, INK, QUIET

__all__ = ["draw_cells"]

STEP, ROW, TOP, RADIUS = 132, 62, 44, 15
_COLOUR = dict(zip(("skip", "avg3", "max3", "conv3", "sep3", "sep5", "dil3"), (QUIET, *COLOURS), strict=False))


def draw_cells(genotype: Genotype) -> str:
    """The cells side by side from top to bottom: inputs left, nodes in order, output right; an edge is an operation."""
    width = STEP * (genotype.nodes + 1) + 110
    height = TOP + ROW * max(2, genotype.nodes) + 10
    cells = "".join(
        f'<g transform="translate(0 {number * height})">{_cell(name, nodes)}</g>'
        for number, (name, nodes) in enumerate(genotype.cells.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * height}" width="{width}" '
        f'height="{2 * height}" font-family="sans-serif" font-size="12" fill="{INK}" role="img">'
        f"<title>cells of the searched network</title>{cells}</svg>"
    )


def _cell(name: str, nodes: tuple[tuple[tuple[int, str], ...], ...]) -> str:
    count = len(nodes)
    place = {0: (40, TOP + ROW // 2), 1: (40, TOP + ROW // 2 + ROW * max(1, count - 1))}
    place |= {node + 2: (40 + STEP * (node + 1), TOP + ROW // 2 + ROW * node) for node in range(count)}
    last = (40 + STEP * (count + 1), TOP + ROW // 2 + ROW * max(1, count - 1) // 2)
    parts = [f'<text x="14" y="20" font-weight="bold">{name} cell</text>']
    for node, edges in enumerate(nodes, start=2):
        for source, operation in edges:
            parts.append(_arrow(place[source], place[node], operation))
        parts.append(_line(place[node], last, QUIET, dashed=True))
    labels = {0: "0", 1: "1"} | {node + 2: str(node + 2) for node in range(count)}
    for number, (x, y) in place.items():
        fill = "#ffffff" if number > 1 else "#e8edf0"
        parts.append(f'<circle cx="{x}" cy="{y}" r="{RADIUS}" fill="{fill}" stroke="{INK}"/>')
        parts.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle">{labels[number]}</text>')
    x, y = last
    parts.append(f'<rect x="{x - 18}" y="{y - 13}" width="52" height="26" rx="4" fill="#e8edf0" stroke="{INK}"/>')
    parts.append(f'<text x="{x + 8}" y="{y + 4}" text-anchor="middle">output</text>')
    return "".join(parts)


def _arrow(start: tuple[int, int], end: tuple[int, int], operation: str) -> str:
    """A bent line, so that edges over a node don't hide behind it, with the operation near its end."""
    (x0, y0), (x1, y1) = start, end
    bend = -26 if y1 <= y0 else 30
    mx, my = (x0 + x1) / 2, (y0 + y1) / 2 + (bend if x1 - x0 > STEP else bend / 2)
    # Three quarters of the way along the curve, where edges into different nodes have parted.
    lx, ly = 0.16 * x0 + 0.48 * mx + 0.36 * x1, 0.16 * y0 + 0.48 * my + 0.36 * y1
    colour = _COLOUR[operation]
    wide = 7 * len(operation) + 6
    return (
        f'<path d="M{x0} {y0} Q{mx:.0f} {my:.0f} {x1} {y1}" fill="none" stroke="{colour}" stroke-width="2.2"/>'
        f'<rect x="{lx - wide / 2:.0f}" y="{ly - 9:.0f}" width="{wide}" height="17" rx="3" fill="#ffffff" '
        f'fill-opacity=".88"/><text x="{lx:.0f}" y="{ly + 4:.0f}" text-anchor="middle">{operation}</text>'
    )


def _line(start: tuple[int, int], end: tuple[int, int], colour: str, *, dashed: bool) -> str:
    dash = ' stroke-dasharray="3 3"' if dashed else ""
    ends = f'x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.4"{dash}/>'
