"""``medray compress``: a smaller, faster bundle, where it stays good enough."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from medray.cli.show import interval, say, table


def compress(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, such as runs/seg/bundle.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OVERRIDES]...", help="data=... where it lies elsewhere now; train.budget=5min"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The new bundle [default: BUNDLE-small]")] = None,
    quantize: Annotated[
        Literal["int8", "dynamic"] | None,
        typer.Option(help="int8: calibrated on training cases; dynamic: linear layers."),
    ] = None,
    qat: Annotated[
        bool, typer.Option("--qat", help="With int8: also fine-tune for it; the better of the two is kept.")
    ] = False,
    prune: Annotated[float | None, typer.Option(help="Share of channels to take away, then fine-tune.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of single weights to make zero, then fine-tune; the file packs smaller.")
    ] = None,
    distill: Annotated[str | None, typer.Option(help="A network of the catalogue that learns from the bundle.")] = None,
    max_drop: Annotated[float, typer.Option(help="What each metric may lose on validation cases.")] = 0.005,
    runtime: Annotated[
        Literal["auto", "torch", "onnx", "openvino", "tensorrt"], typer.Option(help="What will serve; speed is its.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of that runtime [default: all usable CPUs]")] = None,
    calibration: Annotated[int, typer.Option(min=1, help="Training cases that int8 looks at.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of distillation.")] = 4.0,
    alpha: Annotated[float, typer.Option(help="Share of the teacher in distillation.")] = 0.5,
) -> None:
    """Distil, prune, make sparse and quantise, in this order; a step that costs too much or gains nothing is undone.

    Exits with 1 where no step was kept. Example: medray compress runs/seg/bundle --quantize int8 data=scans/ -o small
    """
    from medray.workflows.compress import CompressOptions
    from medray.workflows.compress import compress as run

    options = CompressOptions(
        quantize=quantize,
        qat=qat,
        prune=prune,
        sparsity=sparsity,
        distill=distill,
        max_drop=max_drop,
        runtime=runtime,
        threads=threads,
        calibration=calibration,
        temperature=temperature,
        alpha=alpha,
    )
    place = out or bundle.with_name(f"{bundle.name}-small")
    report = run(
        bundle, options, overrides or [], out=place, note=lambda text: print(text, file=sys.stderr, flush=True)
    )
    rows = []
    for step in report.steps:
        found = step.verdict
        if found is None:
            rows.append([step.name, "undone", "-", "-", "-", "-", "-"])
            continue
        drops = "; ".join(f"{name} {interval(*drop)}" for name, drop in found.drops.items())
        rows.append(
            [
                step.name,
                "kept" if step.kept else "undone",
                drops,
                f"{found.speedup:.2f}",
                found.engines[1],
                f"{found.onnx_mb[0]:.2f} -> {found.onnx_mb[1]:.2f}",
                f"{found.packed_mb[0]:.2f} -> {found.packed_mb[1]:.2f}",
            ]
        )
    table(["step", "", "drop", "times faster", "engine", "MB served", "packed"], rows)
    for step in report.steps:
        if step.compared:
            say(f"{step.name}: {step.compared}")
        if step.reason:
            say(f"{step.name}: undone: {step.reason}")
    say(f"{report.validation_cases} validation cases; drops with 95 % intervals")
    say(f"bundle: {report.bundle}" if report.bundle else "no step was kept; no bundle was written")
    if report.exit_code:
        raise typer.Exit(report.exit_code)
