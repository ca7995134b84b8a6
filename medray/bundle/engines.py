"""Which engine answers for a bundle: make one, or measure all that are here and keep the fastest that agrees."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import nn

from medray.bundle.files import locate
from medray.bundle.spec import BundleSpec
from medray.bundle.verify import check_golden
from medray.data.writers.atomic import appearing
from medray.errors import BundleError, MedrayError
from medray.plan.cpu import cpu_model
from medray.predict.onnx_runtime import OnnxPredictor, usable_cpus
from medray.predict.openvino_runtime import OpenVinoPredictor, openvino_has_bf16
from medray.predict.predictor import Floats, Precision, Predictor
from medray.predict.tensorrt_runtime import TensorRtPredictor
from medray.predict.torch_runtime import TorchPredictor

ONNX_NAME = "model.onnx"

RuntimeName = Literal["torch", "onnx", "openvino", "tensorrt"]
RuntimeChoice = Literal["auto", "torch", "onnx", "openvino", "tensorrt"]
Device = Literal["cpu", "cuda"]

RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
LIBRARIES: dict[RuntimeName, tuple[str, str]] = {
    "torch": ("torch", "torch"),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "tensorrt-cu13"),
}
"""Import name and distribution of each runtime."""
DEVICES: dict[RuntimeName, tuple[Device, ...]] = {
    "torch": ("cpu", "cuda"),
    "onnx": ("cpu", "cuda"),
    "openvino": ("cpu",),
    "tensorrt": ("cuda",),
}

ROUNDS, SECONDS = 15, 1.5
"""Of the measurement: so many turns of all engines, or so many seconds for each; what comes first."""


class Opened(Protocol):
    """What an engine is made from: an opened :class:`~medray.bundle.read.Bundle`."""

    @property
    def directory(self) -> Path:
        """Of its files."""

    @property
    def spec(self) -> BundleSpec:
        """What they are."""

    def model(self) -> nn.Module:
        """The torch twin."""

    def golden(self) -> tuple[Floats, Floats]:
        """Golden inputs and logits."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One engine that was looked at.

    Attributes:
        seconds: of one golden input (median); None where it fell out before it was timed.
        reason: why it fell out, in a sentence; None where it agrees with the golden outputs.
    """

    engine: RuntimeName
    precision: str
    seconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which engine answers, and why that one.

    Attributes:
        engine, precision: what answers.
        fallback_reason: why an engine or precision that this machine has was passed over although it might have been
            faster: it failed, or it did not agree with the golden outputs. None where nothing fell out.
        attempts: all that were looked at, the fastest first; empty where the caller named the engine.
        measured: ISO date of the measurement (UTC); empty where the caller named the engine.
    """

    engine: RuntimeName
    precision: str
    fallback_reason: str | None = None
    attempts: tuple[Attempt, ...] = ()
    measured: str = ""

    @property
    def shown(self) -> str:
        """One line for a person."""
        timed = [f"{a.engine} {a.precision} {a.seconds * 1e3:.3g} ms" for a in self.attempts if a.seconds is not None]
        text = f"{self.engine} {self.precision}" + (f" (measured: {', '.join(timed)})" if timed else "")
        return f"{text}; {self.fallback_reason}" if self.fallback_reason else text


def runtimes_here(bundle: Opened) -> tuple[RuntimeName, ...]:
    """The runtimes that the bundle has files for and whose libraries are installed."""
    return tuple(name for name in RUNTIMES if _lacking(bundle, name) is None)


def _lacking(bundle: Opened, runtime: RuntimeName) -> str | None:
    if runtime == "torch" and bundle.spec.precision == "int8":
        return "it is an int8 bundle, whose torch twin has the weights before quantisation and is kept to explain"
    if runtime != "torch" and ONNX_NAME not in bundle.spec.files:
        return "it has no ONNX file"
    library, distribution = LIBRARIES[runtime]
    if find_spec(library) is None:
        return f"{library!r} is not installed (pip install {distribution})"
    return None


def make_predictor(
    bundle: Opened, runtime: RuntimeName, *, device: Device, precision: str | None, threads: int | None
) -> Predictor:
    """An engine that has just reproduced the golden outputs. ``precision`` None: that of the bundle's own file.

    Raises:
        BundleError: the bundle has nothing for it, or it doesn't reproduce the golden outputs.
        ModelError: device or precision aren't to be had here.
        MissingDependencyError: its library is not installed.
    """
    if runtime not in RUNTIMES:
        raise BundleError(f"there is no runtime {runtime!r}. Choose auto, {', '.join(RUNTIMES)}")
    here = runtimes_here(bundle)
    reason = _lacking(bundle, runtime)
    if reason is not None:
        raise BundleError(
            f"{bundle.directory}: holds nothing for runtime {runtime!r} that can be used here: {reason}. "
            f"Use one of {', '.join(here)}"
        )
    if device not in DEVICES[runtime]:
        raise BundleError(
            f"runtime {runtime!r} runs on {DEVICES[runtime][0]}, not {device}. Choose another runtime or device"
        )
    own = bundle.spec.precision
    wanted = precision or own
    if (own == "int8") != (wanted == "int8"):
        raise BundleError(
            f"{bundle.directory}: is {own}, not {wanted}; int8 is a bundle of its own. Make one with: "
            "medray compress BUNDLE --quantize int8"
            if own == "fp32"
            else f"{bundle.directory}: is an int8 bundle and computes in nothing else. Take the one it was made from"
        )
    made: Predictor
    if runtime == "torch":
        made = TorchPredictor(bundle.model(), device=device, precision=wanted)
    else:
        path = locate(bundle.directory, ONNX_NAME)
        if runtime == "openvino":
            made = OpenVinoPredictor(path, threads=threads, precision=wanted)
        elif runtime == "tensorrt":
            shape = bundle.golden()[0].shape[1:]
            made = TensorRtPredictor(path, shape=shape, precision=wanted, cache=cache_folder() / "tensorrt")
        elif wanted in ("bf16", "fp16"):
            raise BundleError(
                f"the ONNX file computes in fp32, not {wanted}. Use runtime=torch or openvino for {wanted}"
            )
        else:
            made = OnnxPredictor(path, threads=threads, provider=device, precision=wanted)
    check_golden(made, *bundle.golden(), bundle.spec.kind, bundle.spec.temperature)
    return made


def candidates(bundle: Opened, device: Device, precision: str | None) -> Iterator[tuple[RuntimeName, str]]:
    """(engine, precision) of all that could answer for a bundle here."""
    for runtime in runtimes_here(bundle):
        if device not in DEVICES[runtime]:
            continue
        if bundle.spec.precision == "int8":
            found: tuple[str, ...] = ("int8",)
        elif runtime == "torch":
            found = ("fp32", *(("bf16",) if _torch_has_bf16(device) else ()))
        elif runtime == "openvino":
            found = ("fp32", *(("bf16",) if openvino_has_bf16() else ()))
        else:
            found = ("fp32", "fp16") if runtime == "tensorrt" else ("fp32",)
        yield from ((runtime, each) for each in found if precision is None or each == precision)


def _torch_has_bf16(device: Device) -> bool:
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def select(
    bundle: Opened,
    *,
    device: Device,
    precision: Precision | None,
    threads: int | None,
    fresh: bool = False,
    remember: bool = True,
) -> Selection:
    """The fastest engine here that agrees with the golden outputs: remembered for this machine, else measured now.

    The engines take turns on the golden inputs, so that a busy machine is busy for all of them. What is remembered
    lies in the user's cache, for this very bundle, machine, number of threads and versions of the libraries; ``fresh``
    measures in any case, and without ``remember`` the cache is left as it is (for a bundle that won't be seen again).

    Raises:
        BundleError: no engine agrees.
    """
    path = cache_folder() / "engines" / f"{_key(bundle, device, precision, threads)}.json"
    found = None if fresh or not remember else _remembered(path)
    if found is None:
        found = _measure(bundle, device, precision, threads)
        if not remember:
            return found
        with suppress(OSError):  # a read-only home: measured again next time, and as true
            path.parent.mkdir(parents=True, exist_ok=True)
            with appearing(path) as partial:
                partial.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    return found


def _measure(bundle: Opened, device: Device, precision: Precision | None, threads: int | None) -> Selection:
    engines: dict[tuple[RuntimeName, str], Predictor] = {}
    fallen: list[Attempt] = []
    for runtime, each in candidates(bundle, device, precision):
        try:
            engines[runtime, each] = make_predictor(bundle, runtime, device=device, precision=each, threads=threads)
        except MedrayError as error:
            fallen.append(Attempt(engine=runtime, precision=each, reason=str(error)))
    if not engines:
        reasons = "; ".join(f"{a.engine} {a.precision}: {a.reason}" for a in fallen)
        reasons = reasons or f"none computes in {precision or bundle.spec.precision} here"
        raise BundleError(f"{bundle.directory}: no runtime can answer on {device}: {reasons}")
    with torch_threads(threads):
        times = race(engines, bundle.golden()[0])
    timed = sorted(
        (Attempt(engine=key[0], precision=key[1], seconds=float(np.median(found))) for key, found in times.items()),
        key=lambda attempt: attempt.seconds or 0.0,
    )
    return Selection(
        engine=timed[0].engine,
        precision=timed[0].precision,
        fallback_reason="; ".join(f"not {a.engine} {a.precision}: {a.reason}" for a in fallen) or None,
        attempts=(*timed, *fallen),
        measured=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def race(
    engines: dict[tuple[RuntimeName, str], Predictor], inputs: Floats, *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[tuple[RuntimeName, str], list[float]]:
    """Seconds of one input (1, C, *s) by each engine, in turns; each has had one call before that isn't counted."""
    batch = np.ascontiguousarray(inputs[:1])
    for engine in engines.values():
        engine(batch)
    times: dict[tuple[RuntimeName, str], list[float]] = {key: [] for key in engines}
    end = time.perf_counter() + seconds * len(engines)
    for turn in range(rounds):
        for key, engine in engines.items():
            begin = time.perf_counter()
            engine(batch)
            times[key].append(time.perf_counter() - begin)
        if turn >= 2 and time.perf_counter() > end:
            break
    return times


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Let torch compute by ``threads`` threads (None: as it is) inside, as the other engines do."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cache_folder() -> Path:
    """Where this user's machine remembers measurements and built engines; ``MEDRAY_CACHE`` names another place."""
    named = os.environ.get("MEDRAY_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medray"


def _key(bundle: Opened, device: Device, precision: str | None, threads: int | None) -> str:
    """Of everything that could change the answer."""
    facts: dict[str, Any] = {
        "bundle": hashlib.sha256(bundle.spec.model_dump_json().encode()).hexdigest(),
        "asked": [device, precision, threads or usable_cpus(), torch.get_num_threads()],
        "machine": [platform.node(), platform.machine(), cpu_model()],
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" and torch.cuda.is_available() else None,
        "versions": {name: _version(distribution) for name, (_, distribution) in LIBRARIES.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _remembered(path: Path) -> Selection | None:
    """What the cache says; None where it says nothing that makes sense (it is measured again then)."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        attempts = tuple(Attempt(**row) for row in tree.pop("attempts"))
        found = Selection(attempts=attempts, **tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    known = found.engine in RUNTIMES and isinstance(found.precision, str)
    return found if known else None
