"""How much faster is a training step of the default 3-D network than the same in plain fp32 PyTorch?

The network, patch and batch are what the plan gives hippocampus-sized data on a CPU. Each contender lives in a process
of its own (peak memory is that of its steps alone); they take turns, so that a busy machine is busy for all of them.

    python -m benchmarks step
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.common import Figure, Result, Target

WIDTH, DEPTH, CLASSES = 16, 4, 3
PATCH, BATCH = (40, 56, 40), 2
CONTENDERS = ("medray", "PyTorch fp32", "MONAI DynUNet fp32")


def run(quick: bool) -> Result:
    """Time the contenders' steps in turn."""
    rounds, patch = (4, (16, 24, 16)) if quick else (25, PATCH)
    times, memory = _race(rounds, patch)
    ours, plain = times["medray"], times["PyTorch fp32"]
    figures = {
        "speedup": _interval(lambda rows: float(np.median(plain[rows]) / np.median(ours[rows])), len(ours), ""),
        **_figures(ours, memory["medray"]),
    }
    peers = {name: _figures(times[name], memory[name]) for name in CONTENDERS[1:]}
    threads = len(os.sched_getaffinity(0))
    notes = [
        f"U-Net of width {WIDTH}, {DEPTH} levels, deep supervision, {BATCH} patches of {'x'.join(map(str, patch))}, "
        f"Dice + cross-entropy, AdamW; {threads} threads, medians of {rounds} steps taken in turn.",
        "PyTorch fp32: the same network in a plain loop. DynUNet: MONAI's, same widths, no deep supervision.",
    ]
    if not _has_bf16():
        notes.append("This CPU multiplies no bfloat16 in hardware, so the target does not apply.")
    targets = {"speedup": Target(op=">=", value=2.5)} if _has_bf16() else {}
    return Result(figures=figures, targets=targets, peers=peers, notes=notes)


def _race(rounds: int, patch: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, float]]:
    context = mp.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for name in CONTENDERS:
            here, there = context.Pipe()
            process = context.Process(target=_contend, args=(name, patch, there), daemon=True)
            process.start()
            workers[name] = (process, here)
            assert here.recv() == "ready"
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name, (_, pipe) in workers.items():
                pipe.send("step")
                times[name].append(pipe.recv())
        memory = {}
        for name, (_, pipe) in workers.items():
            pipe.send("end")
            memory[name] = pipe.recv()
    finally:
        for process, _ in workers.values():
            process.terminate()
    return {name: np.array(found) for name, found in times.items()}, memory


def _contend(name: str, patch: tuple[int, ...], pipe: Connection) -> None:
    import torch

    from medray.train.memory import peak_mb, reset_peak

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cpu")
    torch.manual_seed(0)
    image = torch.randn(BATCH, 1, *patch)
    target = torch.randint(0, CLASSES, (BATCH, *patch))
    step = _ours(patch) if name == "medray" else _plain(patch, dynunet="DynUNet" in name)
    reset_peak(device)
    before = peak_mb(device)
    for _ in range(2):
        step(image, target)
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        step(image, target)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_mb(device) - before)


def _network(patch: tuple[int, ...]) -> Any:
    from medray.config.schema import ModelConfig
    from medray.models.catalogue import build_model

    config = ModelConfig(name="unet", feature_size=WIDTH, depth=DEPTH, deep_supervision=True)
    return build_model(config, kind="segmentation", ndim=3, in_channels=1, num_outputs=CLASSES, patch_size=patch)


def _ours(patch: tuple[int, ...]) -> Callable[[Any, Any], object]:
    """The step that fit() takes."""
    import torch

    from medray.config.schema import LossConfig, OptimConfig
    from medray.learn.optimizers import build_optimizer
    from medray.tasks.catalogue import build_loss
    from medray.train.precision import lay_out, resolve_precision
    from medray.train.runtime import LocalRuntime
    from medray.train.step import Stepper

    runtime = LocalRuntime()
    precision = resolve_precision("auto", runtime.device)
    model = _network(patch)
    channels_last = lay_out(model, runtime.device, precision)
    stepper = Stepper(
        model,
        build_optimizer(model, OptimConfig()),
        build_loss(LossConfig(), kind="segmentation", num_classes=CLASSES),
        runtime=runtime,
        precision=precision,
        micro_batch=None,
        clip_norm=12.0,
        channels_last=channels_last,
    )
    index = torch.arange(BATCH)
    return lambda image, target: stepper({"image": image, "target": target, "index": index}, place=lambda: "a step")


def _plain(patch: tuple[int, ...], *, dynunet: bool) -> Callable[[Any, Any], object]:
    """What one would write by hand: fp32, default layout, the optimiser as it comes."""
    import torch

    from medray.config.schema import LossConfig
    from medray.tasks.catalogue import build_loss

    if dynunet:
        from monai.networks.nets import DynUNet

        model = DynUNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=CLASSES,
            kernel_size=[3] * DEPTH,
            strides=[1] + [2] * (DEPTH - 1),
            upsample_kernel_size=[2] * (DEPTH - 1),
            filters=[WIDTH * 2**level for level in range(DEPTH)],
        )
    else:
        model = _network(patch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = build_loss(LossConfig(), kind="segmentation", num_classes=CLASSES)

    def step(image: Any, target: Any) -> None:
        optimizer.zero_grad()
        loss(model(image), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
        optimizer.step()

    return step


def _figures(times: Any, memory: float) -> dict[str, Figure]:
    return {
        "images_per_second": _interval(lambda rows: float(BATCH / np.median(times[rows])), len(times), "images/s"),
        "peak_memory": Figure(value=memory, unit="MiB"),
    }


def _interval(statistic: Callable[[Any], float], count: int, unit: str) -> Figure:
    from medray.learn.intervals import bootstrap

    return Figure(**bootstrap(np.arange(count), statistic, method="percentile")._asdict(), unit=unit)


def _has_bf16() -> bool:
    from medray.train.precision import cpu_has_bf16

    return cpu_has_bf16()
