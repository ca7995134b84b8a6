"""How much memory does gradient checkpointing save in each family of networks, and what does it cost in time?

Every family of the catalogue, 2-D and 3-D, without and with checkpointing, for several batch sizes. Each contender is a
process of its own, whose peak memory is that of its own steps; the contenders of one network take turns, so that a busy
machine is busy for all of them. The bytes kept for backward are counted exactly, not measured. Beside the results file,
a table of all runs is written as ``checkpointing.md``.

    python -m benchmarks checkpointing
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, Figure, Result, Target

NETWORKS: Mapping[int, Sequence[str]] = {
    2: (
        "unet", "unetpp", "segresnet", "swin_unetr", "unetr", "transunet", "deeplabv3_mobilenet", "pspnet", "hrnet",
        "bisenet", "small_cnn", "mobilenetv3", "efficientnet_b0", "shufflenetv2", "resnet18", "densenet121", "vit_s",
        "swin", "convnext", "medvit",
    ),
    3: (
        "unet", "resenc_unet", "unetpp", "dynunet", "segresnet", "swin_unetr", "swin_unet", "unetr", "transunet",
        "small_cnn", "resnet18", "densenet121",
    ),
}  # fmt: skip
NEEDY = (
    "unet 3-D", "resenc_unet 3-D", "dynunet 3-D", "unetr 3-D", "swin_unetr 3-D", "densenet121 2-D", "densenet121 3-D",
)  # fmt: skip
"""Those that need it: their peak memory is judged, too."""
HOWS: Sequence[str | int] = ("off", "auto", 4, 16)
"""The first two for every network and batch size; numbers of segments as far as there is time for them."""
BATCHES = (2, 4)
SECONDS = 1500.0
"""In which all of it should be done: from the first network that is behind its part of them, without the numbers."""
SIDE = {("segmentation", 2): 128, ("segmentation", 3): 48, ("classification", 2): 96, ("classification", 3): 48}
"""Pixels along an axis of the input; rounded up to what a network takes."""
OUTPUTS = 3
DEVICE = "cpu"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one contender did.

    Attributes:
        kept: bytes kept for backward.
        peak: MiB at the height of a step, over what the process held with the network built.
        state: MiB of gradients and the optimiser's state, which are part of the peak in any case.
        seconds: of each step.
        difference: largest of a gradient from the plain network's, over the largest gradient.
        segments: number of them.
    """

    network: str
    batch: int
    how: str | int
    kept: int
    peak: float
    state: float
    seconds: Sequence[float]
    difference: float
    segments: int


def run(quick: bool) -> Result:
    """Race the settings of each network against one another."""
    networks = [(name, ndim) for ndim, names in NETWORKS.items() for name in names]
    batches, rounds, warm = BATCHES, 4, 1
    if quick:
        networks, batches, rounds, warm = [("unet", 3), ("resnet18", 2)], BATCHES[:1], 2, 1
    runs: list[Run] = []
    started = time.monotonic()
    for number, (name, ndim) in enumerate(networks):
        behind = time.monotonic() - started > SECONDS * number / len(networks)
        hows = HOWS[:2] if quick or (number and behind) else HOWS
        for batch in batches:
            runs += race(name, ndim, batch, hows, rounds=rounds, warm=warm, small=quick)
            print(_row(runs[-len(hows)], runs[-len(hows) + 1]), flush=True)
    folder = ROOT / "runs" / "benchmarks" if quick else RESULTS
    _write(folder / "checkpointing.md", runs)
    return _result(runs, rounds)


def race(
    name: str, ndim: int, batch: int, hows: Sequence[str | int], *, rounds: int, warm: int, small: bool = False
) -> list[Run]:
    """One network, one batch size, all settings, step by step in turn."""
    # The server has the libraries imported, and has computed nothing: its children are alike, and quick to begin.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["medray.models.catalogue", "medray.train.step", "medray.learn.losses"])
    workers: list[tuple[Any, Connection]] = []
    try:
        for how in hows:
            here, there = context.Pipe()
            process = context.Process(target=_contend, args=(name, ndim, batch, how, warm, small, there), daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
            _hear(here, name)
        times: list[list[float]] = [[] for _ in hows]
        for _ in range(rounds):
            for found, (_, pipe) in zip(times, workers, strict=True):
                pipe.send("step")
                found.append(_hear(pipe, name))
        runs = []
        for how, seconds, (_, pipe) in zip(hows, times, workers, strict=True):
            pipe.send("end")
            ended = _hear(pipe, name)
            runs.append(Run(network=f"{name} {ndim}-D", batch=batch, how=how, seconds=seconds, **ended))
    finally:
        for process, _ in workers:
            process.terminate()
            process.join()
    return runs


def _hear(pipe: Connection, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(
            f"the process of {name} ended: it ran out of memory, or its traceback stands above"
        ) from None


def _contend(name: str, ndim: int, batch: int, how: str | int, warm: int, small: bool, pipe: Connection) -> None:
    import torch

    from medray.models import checkpointing
    from medray.models.catalogue import lookup
    from medray.train.memory import peak_mb, reset_peak
    from medray.train.precision import autocast, lay_out, memory_format, resolve_precision

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device(DEVICE)
    precision = resolve_precision("auto", device)
    kind, shape = _task(name, ndim, small=small)
    torch.manual_seed(0)
    images = torch.randn(batch, 1, *shape)
    targets = torch.randint(0, OUTPUTS, (batch, *shape) if kind == "segmentation" else (batch,))
    model = _network(name, ndim, shape)
    if lay_out(model, device, precision):
        images = images.to(memory_format=memory_format(ndim, device, precision))
    kept = checkpointing.share_kept(lookup(name).family)
    state = 3 * sum(p.nbytes for p in model.parameters()) / 2**20  # AdamW has two moments beside each gradient
    segments: tuple[str, ...] = ()

    def first(probe: Any) -> None:
        nonlocal segments
        segments = checkpointing.apply(model, how, probe, kept=kept)

    step = _stepper(model, kind, precision, first)
    gc.collect()
    reset_peak(device)
    before = peak_mb(device)
    for _ in range(warm):
        step(images, targets)
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        step(images, targets)
        pipe.send(time.perf_counter() - start)
    peak = peak_mb(device) - before
    with autocast(precision, device):
        saved = checkpointing.saved_bytes(model, images)
    again = _gradients(model, images, precision)
    checkpointing.apply(model, "off", images)
    plain = _gradients(model, images, precision)
    largest = max(float(gradient.abs().max()) for gradient in plain)
    off = max(float((one - other).abs().max()) for one, other in zip(plain, again, strict=True))
    pipe.send({"kept": saved, "peak": peak, "state": state, "difference": off / largest, "segments": len(segments)})


def _task(name: str, ndim: int, *, small: bool = False) -> tuple[Any, tuple[int, ...]]:
    from medray.config.schema import ModelConfig
    from medray.models.catalogue import lookup

    spec, config = lookup(name), ModelConfig(name=name)
    kind = spec.kinds[0]
    multiple = spec.divisor(config, ndim)
    side = max(spec.smallest(config, ndim), -(-SIDE[kind, ndim] // (2 if small else 1) // multiple) * multiple)
    return kind, (side,) * ndim


def _network(name: str, ndim: int, shape: tuple[int, ...]) -> Any:
    from medray.config.schema import ModelConfig
    from medray.models.catalogue import build_model

    kind, _ = _task(name, ndim)
    config = ModelConfig(name=name)
    model = build_model(config, kind=kind, ndim=ndim, in_channels=1, num_outputs=OUTPUTS, patch_size=shape)
    return model.train()


def _stepper(model: Any, kind: Any, precision: Any, first: Callable[[Any], None]) -> Callable[[Any, Any], object]:
    """The step that fit() takes."""
    import torch

    from medray.config.schema import LossConfig, OptimConfig
    from medray.learn.optimizers import build_optimizer
    from medray.tasks.catalogue import build_loss
    from medray.train.runtime import LocalRuntime
    from medray.train.step import Stepper

    loss = LossConfig() if kind == "segmentation" else LossConfig(name="cross_entropy")
    stepper = Stepper(
        model,
        build_optimizer(model, OptimConfig(lr=1e-4)),
        build_loss(loss, kind=kind, num_classes=OUTPUTS),
        runtime=LocalRuntime(DEVICE),
        precision=precision,
        micro_batch=None,
        clip_norm=12.0,
        channels_last=False,  # the images lie as they should already
        first=first,
    )

    def step(images: Any, targets: Any) -> object:
        batch = {"image": images, "target": targets, "index": torch.arange(len(images))}
        return stepper(batch, place=lambda: "a step")

    return step


def _gradients(model: Any, images: Any, precision: Any) -> list[Any]:
    import torch

    from medray.train.precision import autocast

    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with autocast(precision, torch.device(DEVICE)):
        logits = model(images)
    logits.float().square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# -- what was found
# ------------------------------------------------------------------------------------------------------------------


def _ratios(plain: Run, other: Run) -> tuple[float, float, float]:
    """Bytes shed, longer steps and lower peak, as shares of the plain network's."""
    slower = statistics.median(b / a for a, b in zip(plain.seconds, other.seconds, strict=True))
    return 1 - other.kept / plain.kept, slower - 1, 1 - other.peak / max(plain.peak, 1.0)


def _pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    plain = {(run.network, run.batch): run for run in runs if run.how == "off"}
    return [(plain[run.network, run.batch], run) for run in runs if run.how != "off"]


def _row(plain: Run, other: Run) -> str:
    shed, slower, peak = _ratios(plain, other)
    return (
        f"{other.network:22} batch {other.batch}, {other.how}: {shed:.0%} fewer bytes, steps {slower:+.0%}, "
        f"peak {-peak:+.0%}"
    )


def _result(runs: Sequence[Run], rounds: int) -> Result:
    figures: dict[str, Figure] = {}
    targets: dict[str, Target] = {}
    automatic = [(plain, other) for plain, other in _pairs(runs) if other.how == "auto"]
    for network in dict.fromkeys(other.network for _, other in automatic):
        found = [_ratios(plain, other) for plain, other in automatic if other.network == network]
        # The worst of the batch sizes.
        figures[f"{network}, bytes shed"] = Figure(value=min(shed for shed, _, _ in found))
        figures[f"{network}, longer steps"] = Figure(value=statistics.median(slower for _, slower, _ in found))
        figures[f"{network}, lower peak"] = Figure(value=max(peak for _, _, peak in found))
        beyond = [1 - (o.peak - o.state) / max(p.peak - p.state, 1.0) for p, o in automatic if o.network == network]
        figures[f"{network}, lower peak beyond state"] = Figure(value=max(beyond))
        targets[f"{network}, bytes shed"] = Target(op=">=", value=0.5)
        targets[f"{network}, longer steps"] = Target(op="<=", value=0.3)
        if network in NEEDY:
            targets[f"{network}, lower peak"] = Target(op=">=", value=0.3)
    figures["largest difference of a gradient"] = Figure(value=max(run.difference for run in runs))
    targets["largest difference of a gradient"] = Target(op="<=", value=1e-5)
    sides = ", ".join(str(side) for side in sorted(set(SIDE.values())))
    notes = [
        f"train.checkpointing=auto against off, inputs of {sides} pixels an axis (see SIDE), the precision that "
        f"train.precision=auto takes here; medians of {rounds} steps taken in turn. Bytes: the worst batch size; peak "
        "memory: the batch size with the larger gain.",
        "Peak memory is that of the whole step beyond the built network: gradients and the optimiser's state, which "
        "checkpointing can't shed, are in it, and so is what the C library keeps of freed blocks. Beyond state: "
        "without the former.",
        f"All runs, also with 4 and 16 segments as far as {SECONDS / 60:.0f} min allow: results/checkpointing.md.",
    ]
    return Result(figures=figures, targets=targets, notes=notes)


def _write(path: Path, runs: Sequence[Run]) -> None:
    """The Markdown table of all runs."""
    lines = [
        "# Gradient checkpointing, run by run",
        "",
        "Written by `python -m benchmarks checkpointing`. Kept: bytes kept for the backward pass. Peak: of the process "
        "in a step, over the built network. State: gradients and AdamW's moments, part of the peak in any case. "
        "Gradient: its largest difference from the plain network's, over the largest gradient.",
        "",
        "| network | batch | checkpointing | segments | kept, MiB | | peak, MiB | | state, MiB | step, ms | "
        "| gradient |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {(run.network, run.batch): run for run in runs if run.how == "off"}
    for found in runs:
        shed, slower, peak = _ratios(plain[found.network, found.batch], found)
        off = found.how == "off"
        lines.append(
            f"| {found.network} | {found.batch} | {found.how} | {found.segments} | {found.kept / 2**20:.1f} | "
            f"{'' if off else f'{-shed:+.0%}'} | {found.peak:.0f} | {'' if off else f'{-peak:+.0%}'} | "
            f"{found.state:.0f} | {1e3 * statistics.median(found.seconds):.0f} | {'' if off else f'{slower:+.0%}'} | "
            f"{found.difference:.1g} |"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
