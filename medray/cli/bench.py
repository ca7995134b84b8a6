"""``medray bench``: what a bundle costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import say, table


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON on stdout.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of each engine [default: all usable CPUs]")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes for the throughput.")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(min=0.01, help="For each figure of each engine.")] = 3.0,
    image: Annotated[str | None, typer.Option(help="An image for the split of times [default: noise]")] = None,
) -> None:
    """Measure each runtime that is here: latency, throughput, memory, size, and where the time of an image goes."""
    from medray.errors import ConfigError
    from medray.workflows.bench import SPLIT
    from medray.workflows.bench import bench as measure

    try:
        sizes = [int(word) for word in batches.split(",")]
    except ValueError:
        raise ConfigError(f"--batches {batches}: give whole numbers with commas between, such as 1,4,16") from None
    found = measure(bundle, device=device, threads=threads, batches=sizes, seconds=seconds, image=image)
    if as_json:
        say(found.to_json())
        return
    say(f"{found.bundle}: {found.kind}, inputs of {' x '.join(map(str, found.shape))}, {found.threads} threads")
    say(", ".join(f"{name} {value:.1f} MB" for name, value in found.size_mb.items()))
    columns = ["engine", "p50 ms", "p95 ms", "p99 ms", *(f"x{size} /s" for size in sizes), "peak MB", "load s"]
    columns += [f"{part} ms" for part in SPLIT]
    rows = []
    for row in found.engines:
        name = f"{row.engine} {row.precision}"
        if row.latency_ms is None or row.throughput is None or row.split_ms is None:
            rows.append([name, *["-"] * (len(columns) - 1)])
            continue
        figures = [row.latency_ms[key] for key in ("p50", "p95", "p99")]
        figures += [row.throughput[size] for size in sizes]
        figures += [row.peak_mb or float("nan"), row.load_seconds, *(row.split_ms[part] for part in SPLIT)]
        rows.append([name, *(f"{value:.4g}" for value in figures)])
    table(columns, rows)
    say(f"split: one image, {found.image}")
    for row in found.engines:
        if row.reason:
            say(f"{row.engine} {row.precision}: {row.reason}")
    if found.chosen is not None:
        say(f"auto takes: {found.chosen.shown}")
