"""How fast, how large: every runtime of a bundle that is here, each in a process of its own: ``medray bench``."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medray.bundle.engines import ONNX_NAME, Device, RuntimeName, Selection, candidates, torch_threads
from medray.bundle.read import Bundle
from medray.data.image import Image
from medray.data.manifest import Case
from medray.data.readers import read_case
from medray.data.writers import nifti
from medray.errors import ConfigError, MedrayError
from medray.predict.onnx_runtime import usable_cpus
from medray.predict.predictor import Predictor
from medray.train.memory import peak_mb

SPLIT = ("decode", "prepare", "network", "finish")
LEAST = 3
"""Calls of anything that is timed, however slow."""


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """One engine in one precision.

    Attributes:
        reason: why there are no figures: it failed, or does not agree with the golden outputs.
        load_seconds: from the files to the first answer, golden check included.
        latency_ms: ``p50``, ``p95``, ``p99`` of one network input at a time, over ``calls`` calls.
        throughput: network inputs a second, by batch size.
        peak_mb: largest resident memory of the process, libraries included; None where it had no process of its own.
        split_ms: medians for one whole image: decode, prepare, network, finish.
    """

    engine: RuntimeName
    precision: str
    reason: str | None = None
    load_seconds: float = 0.0
    calls: int = 0
    latency_ms: dict[str, float] | None = None
    throughput: dict[int, float] | None = None
    peak_mb: float | None = None
    split_ms: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What a bundle costs here.

    Attributes:
        shape: (C, *s) of one network input.
        image: what ``split_ms`` was measured on.
        size_mb: on disk: ``bundle``, its ``weights``, its ``onnx`` file.
        chosen: what ``runtime: auto`` takes.
    """

    bundle: str
    kind: str
    shape: tuple[int, ...]
    device: str
    threads: int
    image: str
    size_mb: dict[str, float]
    engines: tuple[EngineFigures, ...]
    chosen: Selection | None

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What one process measures; travels to it."""

    bundle: str
    engine: RuntimeName
    precision: str
    device: Device
    threads: int
    batches: tuple[int, ...]
    seconds: float
    image: str


def bench(
    bundle_dir: Path | str,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    batches: Sequence[int] = (1, 2, 4, 8),
    seconds: float = 3.0,
    image: str | None = None,
    isolated: bool = True,
) -> BenchReport:
    """Measure every runtime that is here.

    Args:
        bundle_dir: of the bundle.
        device: cpu or cuda.
        threads: of each engine; None for all usable CPUs.
        batches: sizes at which throughput is taken.
        seconds: for each figure of each engine.
        image: reference of an image for the split; None: noise of the network's own input shape, as PNG or NIfTI.
        isolated: a process for each engine, one after another, without which memory can't be told apart.

    Raises:
        BundleError: the bundle can't be used.
        ConfigError: a batch or time that makes no sense.
    """
    if not batches or min(batches) < 1 or max(batches) > 4096 or seconds <= 0:
        raise ConfigError(
            f"batches {list(batches)} and seconds {seconds}: give sizes from 1 to 4096, and a time above 0"
        )
    bundle, count = Bundle.open(bundle_dir), threads or usable_cpus()
    shape = tuple(int(n) for n in bundle.golden()[0].shape[1:])
    with tempfile.TemporaryDirectory(prefix="medray-bench-") as folder:
        shown = image or f"noise of {' x '.join(map(str, shape))}"
        source = image or _noise(bundle, shape, Path(folder))
        rows = []
        for engine, precision in candidates(bundle, device, None):
            asked = _Asked(
                bundle=str(bundle.directory),
                engine=engine,
                precision=precision,
                device=device,
                threads=count,
                batches=tuple(dict.fromkeys(batches)),
                seconds=seconds,
                image=source,
            )
            rows.append(_alone(asked) if isolated else _measure(asked))
    try:
        chosen = bundle.select(device=device, threads=count)
    except MedrayError:
        chosen = None
    return BenchReport(
        bundle=bundle.spec.name,
        kind=bundle.spec.kind,
        shape=shape,
        device=device,
        threads=count,
        image=shown,
        size_mb=sizes_mb(bundle),
        engines=tuple(rows),
        chosen=chosen,
    )


def sizes_mb(bundle: Bundle) -> dict[str, float]:
    """Megabytes on disk: of the whole bundle, its weights, its ONNX file."""
    files = bundle.spec.files
    weights = sum(entry.bytes for name, entry in files.items() if name.startswith("weights/"))
    onnx = files[ONNX_NAME].bytes if ONNX_NAME in files else 0
    return {"bundle": sum(e.bytes for e in files.values()) / 1e6, "weights": weights / 1e6, "onnx": onnx / 1e6}


def _alone(asked: _Asked) -> EngineFigures:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(asked, there), daemon=True)
    process.start()
    there.close()
    try:
        found: EngineFigures = here.recv()
    except EOFError:
        process.join()
        found = EngineFigures(
            engine=asked.engine,
            precision=asked.precision,
            reason=f"its process died (exit code {process.exitcode}); too little memory, most likely",
        )
    process.join()
    return found


def _child(asked: _Asked, pipe: Connection) -> None:
    found = _measure(asked)
    peak = peak_mb(torch.device("cpu"))  # getrusage would tell the parent's peak where that is the larger one
    pipe.send(EngineFigures(**{**found.__dict__, "peak_mb": peak}))


def _measure(asked: _Asked) -> EngineFigures:
    with torch_threads(asked.threads):
        began = time.perf_counter()
        try:
            bundle = Bundle.open(asked.bundle)
            engine = bundle.predictor(
                asked.engine,
                device=asked.device,
                precision=asked.precision,  # type: ignore[arg-type]  # one of `candidates`
                threads=asked.threads,
            )
            loaded = time.perf_counter() - began
            inputs = bundle.golden()[0]
            calls = times_of(engine, inputs[:1], asked.seconds)
            p50, p95, p99 = (float(np.percentile(calls, q)) * 1e3 for q in (50, 95, 99))
            throughput = {}
            for size in asked.batches:
                batch = np.ascontiguousarray(np.resize(inputs, (size, *inputs.shape[1:])))
                throughput[size] = size / float(np.median(times_of(engine, batch, asked.seconds / 2)))
            return EngineFigures(
                engine=asked.engine,
                precision=asked.precision,
                load_seconds=loaded,
                calls=len(calls),
                latency_ms={"p50": p50, "p95": p95, "p99": p99},
                throughput=throughput,
                split_ms=split_of(bundle, engine, asked.image, asked.seconds),
            )
        except MedrayError as error:
            return EngineFigures(engine=asked.engine, precision=asked.precision, reason=str(error))


def times_of(engine: Predictor, batch: Any, seconds: float) -> list[float]:
    """Seconds of each call on (B, C, *s), for about so long; the first call isn't counted."""
    engine(batch)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST or time.perf_counter() < end:
        begin = time.perf_counter()
        engine(batch)
        times.append(time.perf_counter() - begin)
    return times


def split_of(bundle: Bundle, engine: Predictor, reference: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of decode, prepare, network and finish for one image."""
    rows: list[list[float]] = []
    case = Case(id="bench", images=(reference,))
    end = time.perf_counter() + seconds
    while len(rows) < LEAST or time.perf_counter() < end:
        begin = time.perf_counter()
        image, _, _ = read_case(case, Path())
        decoded = time.perf_counter() - begin
        spent = bundle.predict(image, engine).seconds
        rows.append([decoded, spent["prepare"], spent["network"], spent["finish"]])
    return {name: float(value) * 1e3 for name, value in zip(SPLIT, np.median(rows, axis=0), strict=True)}


def _noise(bundle: Bundle, shape: tuple[int, ...], folder: Path) -> str:
    """Seeded noise as a file that the reader decodes: PNG where it can hold it, NIfTI in 3-D, else an array."""
    from PIL import Image as Pillow

    values = np.random.default_rng(0).integers(0, 256, size=shape)
    if bundle.spec.ndim == 3 and shape[0] == 1:
        spacing = bundle.spec.preprocess.spacing or (1.0, 1.0, 1.0)
        image = Image(array=values.astype(np.float32), spacing=tuple(spacing))
        path = folder / "noise.nii.gz"
        nifti.write_labels(path, values[0].astype(np.int16), image)
        return str(path)
    if bundle.spec.ndim == 2 and shape[0] in (1, 3):
        pixels = values.astype(np.uint8)
        path = folder / "noise.png"
        Pillow.fromarray(pixels[0] if shape[0] == 1 else np.moveaxis(pixels, 0, -1)).save(path)
        return str(path)
    raise ConfigError(
        f"no file format holds noise of shape {shape} for this bundle. Name an image of your own with --image"
    )
