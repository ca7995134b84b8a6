"""What every benchmark shares: figures with intervals, targets, the results file, the table, the peers' environment."""

from __future__ import annotations

import ast
import datetime as dt
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"
LIBRARIES = ("medray", "torch", "ray", "optuna", "monai", "timm", "numpy", "onnxruntime-gpu")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value, its 95 % interval (None where none is stated) and its unit ("" for a plain ratio)."""

    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{_number(self.low)}, {_number(self.high)}]"
        return f"{_number(self.value)}{interval}{' ' if self.unit else ''}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a figure has to reach."""

    op: Literal[">=", "<=", "=="]
    value: float

    def met(self, figure: Figure) -> bool:
        """Whether the figure's value reaches it; a NaN never does."""
        return {">=": figure.value >= self.value, "<=": figure.value <= self.value, "==": figure.value == self.value}[
            self.op
        ]

    def __str__(self) -> str:
        return f"{self.op} {_number(self.value)}"


Figures = Mapping[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one benchmark found.

    Attributes:
        figures: ours, by name.
        targets: by the name of the figure that they judge.
        peers: the same figures of others, measured in the same run.
        notes: what a reader has to know: what was left out and why, what held a figure back.
    """

    figures: Figures
    targets: Mapping[str, Target] = field(default_factory=dict)
    peers: Mapping[str, Figures] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(self.figures))
        if unknown:
            raise ValueError(f"targets without a figure: {', '.join(unknown)}; figures: {', '.join(self.figures)}")

    @property
    def met(self) -> dict[str, bool]:
        """Which targets are met."""
        return {name: target.met(self.figures[name]) for name, target in self.targets.items()}

    def table(self) -> str:
        """A Markdown table: ours, the target, and each peer beside us."""
        names = list(dict.fromkeys([*self.figures, *(name for figures in self.peers.values() for name in figures)]))
        rows = [["figure", "medray", "target", *self.peers]]
        for name in names:
            target = self.targets.get(name)
            verdict = f"{target} {'✓' if self.met[name] else '✗'}" if target else ""
            ours = str(self.figures[name]) if name in self.figures else ""
            rows.append(
                [name, ours, verdict, *(str(peer[name]) if name in peer else "" for peer in self.peers.values())]
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*lines, *(["", *(f"- {note}" for note in self.notes)] if self.notes else [])])

    def save(self, name: str, folder: Path) -> Path:
        """Write ``NAME.json`` with date, machine and versions; the schema is in the project's design."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "figures": {key: _finite(asdict(figure)) for key, figure in self.figures.items()},
            "targets": {key: asdict(target) for key, target in self.targets.items()},
            "met": self.met,
            "peers": {
                peer: {key: _finite(asdict(f)) for key, f in figures.items()} for peer, figures in self.peers.items()
            },
            "notes": list(self.notes),
        }
        path = folder / f"{name}.json"
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> tuple[Result, dict[str, Any]]:
        """A saved result, and the whole document."""
        document = json.loads(path.read_text(encoding="utf-8"))

        def figures(raw: dict[str, Any]) -> dict[str, Figure]:
            return {
                key: Figure(**{**row, "value": math.nan if row["value"] is None else row["value"]})
                for key, row in raw.items()
            }

        result = cls(
            figures=figures(document["figures"]),
            targets={key: Target(**row) for key, row in document["targets"].items()},
            peers={peer: figures(raw) for peer, raw in document["peers"].items()},
            notes=document.get("notes", []),
        )
        return result, document


def over_seeds(values: Sequence[float]) -> Figure:
    """The mean of one value a seed, with the 95 % interval of that mean by Student's t."""
    from scipy.stats import t

    centre = mean(values)
    if len(values) < 2:
        return Figure(value=centre)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Figure(value=centre, low=centre - half, high=centre + half)


def names() -> list[str]:
    """The benchmarks at hand."""
    helpers = {"common", "__init__", "__main__"}
    return sorted(
        path.stem for path in FOLDER.glob("*.py") if path.stem not in helpers and not path.stem.startswith("_")
    )


def question(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing it."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0] if text else name


def render(folder: Path = RESULTS) -> str:
    """``benchmarks/README.md`` from the results files."""
    lines = [
        "# Benchmarks",
        "",
        "`python -m benchmarks NAME` answers one question (with `--quick` in a minute); `make bench`: all.",
        "This page is made by `python -m benchmarks report` from `results/*.json`: no figure is typed by hand.",
        "Intervals are 95 %.",
        "",
    ]
    for name in names():
        lines += [f"## {name}", "", question(name), ""]
        path = folder / f"{name}.json"
        if not path.is_file():
            lines += ["Not run yet.", ""]
            continue
        result, document = Result.load(path)
        box = document["machine"]
        where = f"{box['cpu']}, {box['cores']} cores, {box['memory_gb']} GB" + (
            f", {box['gpu']}" if box.get("gpu") else ""
        )
        stack = ", ".join(f"{library} {version}" for library, version in document["versions"].items())
        lines += [result.table(), "", f"{document['date'][:10]} on {where}; {stack}.", ""]
    return "\n".join(lines)


def shared_data() -> Path:
    """Where the real data lie: beside the checkout, or ``MEDRAY_SHARED_DATA``.

    Raises:
        SystemExit: they are not there.
    """
    folder = Path(os.environ.get("MEDRAY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"{folder}: the real data are not there; MEDRAY_SHARED_DATA names another place")
    return folder


def peer_python() -> Path | None:
    """The interpreter of the peers' environment (``make bench-peers``), None where it isn't installed."""
    path = ROOT / ".venv-peers" / "bin" / "python"
    return path if path.is_file() and (ROOT / ".venv-peers" / ".ready").is_file() else None


def machine() -> dict[str, Any]:
    """What this was measured on."""
    import psutil

    from medray.plan.cpu import cpu_model

    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
    }
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        if gpus:
            found["gpu"] = ", ".join(gpus.splitlines())
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def versions() -> dict[str, str]:
    """Of Python and of the libraries that decide the figures."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
