"""What a network costs to run: exported, in the engine that will serve it, in a process of its own, on this machine.

Costs depend on the architecture and the input's shape, not on what was learnt, so that a study measures each distinct
pair once and remembers it (``costs/`` in its folder). A first look is one process; the last one, before a champion is
chosen, is several, one after another, with nothing else of the study running.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medray.bundle.engines import ONNX_NAME, Device, select
from medray.bundle.read import Bundle
from medray.config.schema import Experiment
from medray.data.writers.atomic import appearing
from medray.errors import BundleError
from medray.learn.intervals import Interval, bootstrap
from medray.plan.cpu import cpu_model
from medray.plan.machine import Machine
from medray.predict.onnx_runtime import usable_cpus
from medray.search.selection import exact
from medray.train.precision import resolve_device
from medray.workflows.champion import Candidate
from medray.workflows.packing import write_champion
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, new_model, outputs

SECONDS = 1.5
"""Of timed calls in each process."""
BLOCKS = 5
"""Stretches of calls in a process: an interval is of these, since what disturbs a machine lasts longer than a call."""
QUIET = 2
"""Processes of the last look."""
_INPUT = ("preprocess.size", "preprocess.pad_multiple")
PATIENCE = 120.0
"""Seconds after which a process that has not answered is given up."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one architecture costs.

    Attributes:
        engine, precision: what serves it here: the fastest that reproduces the golden outputs.
        fallen: what else was faster perhaps, but does not agree with the golden outputs for these weights; or None.
        machine: node, CPU and cores.
        threads: that the engine computes with.
        shape: (C, *s) of the input; batch 1.
        latency_ms, latency_p95_ms: of all calls, with 95 % intervals of the bootstrap over blocks of calls.
        fastest_ms: of the fastest call.
        memory_mb: largest peak (MiB) of the processes, libraries included; the interval spans them all. On CUDA of
            torch's device memory.
        size_mb: of the exported file (10^6 bytes).
        processes, calls: that were timed.
        others: share of the machine's CPU time that other programs took meanwhile, 0..1.
        trained: whether the weights were trained ones.
        seconds: that the measuring took.
        process_seconds: of these, in each process.
    """

    engine: str
    precision: str
    fallen: str | None
    machine: str
    device: str
    threads: int
    shape: tuple[int, ...]
    latency_ms: Interval
    latency_p95_ms: Interval
    fastest_ms: float
    memory_mb: Interval
    size_mb: float
    parameters: int
    processes: int
    calls: int
    others: float
    trained: bool
    seconds: float
    process_seconds: float

    @property
    def figures(self) -> dict[str, Interval]:
        """By the names that limits, objectives and expressions use."""
        return {
            "latency_ms": self.latency_ms,
            "latency_p95_ms": self.latency_p95_ms,
            "memory_mb": self.memory_mb,
            "size_mb": exact(self.size_mb),
            "parameters": exact(self.parameters),
        }

    @property
    def first_look(self) -> float:
        """Seconds that a look by one process takes."""
        return self.seconds - (self.processes - 1) * self.process_seconds

    @property
    def values(self) -> dict[str, float]:
        """The same without intervals."""
        return {name: found.value for name, found in self.figures.items()}

    @property
    def is_quiet(self) -> bool:
        """Whether this was a last look."""
        return self.processes >= QUIET

    def surely_breaks(self, limits: dict[str, float]) -> dict[str, float]:
        """The limits that it can't keep however quiet the machine, with what would have to be allowed.

        Of latency that is what the fastest call would have taken without the other programs' share of the CPU; nothing
        is said of it where an engine fell out that may serve once the weights are trained.
        """
        least = {"memory_mb": self.memory_mb.low, "size_mb": self.size_mb, "parameters": float(self.parameters)}
        if self.fallen is None:
            fastest = self.fastest_ms * (1.0 - self.others)
            least |= {"latency_ms": fastest, "latency_p95_ms": fastest}
        return {name: least[name] for name, limit in limits.items() if least.get(name, 0.0) > limit}

    @property
    def shown(self) -> str:
        """How it was measured, in a line."""
        text = (
            f"{self.engine} {self.precision} on {self.machine}, {self.threads} threads, input "
            f"{' x '.join(map(str, self.shape))}, {self.calls} calls in {self.processes} processes"
        )
        return f"{text}; other programs took {self.others:.0%} of the CPU" if self.others > 0.1 else text

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """What :meth:`to_json` wrote."""
        tree = json.loads(text)
        for name in ("latency_ms", "latency_p95_ms", "memory_mb"):
            tree[name] = Interval(*tree[name])
        return cls(**{**tree, "shape": tuple(tree["shape"])})


def untrained(recipe: Recipe, experiment: Experiment) -> Candidate:
    """A candidate with the architecture of an experiment and random weights; nothing is fetched."""
    bare = experiment.model_copy(update={"model": experiment.model.model_copy(update={"pretrained": None})})
    return Candidate(
        name="untrained", members=(Network(model=new_model(bare, recipe.manifest).eval(), experiment=bare),)
    )


def costs_of(
    recipe: Recipe,
    candidate: Candidate,
    folder: Path,
    *,
    quiet: bool = False,
    trained: bool = True,
    afresh: bool = False,
    seconds: float = SECONDS,
) -> Costs:
    """What a candidate costs here, from ``folder`` if its architecture was looked at as closely before.

    Args:
        recipe: whence task and shapes.
        candidate: one network or several; they are exported as one.
        folder: of remembered costs. One measuring at a time uses it.
        quiet: the last look: several processes.
        trained: whether the weights are trained ones; without, a remembered look at either will do.
        afresh: with these very weights, whatever is remembered; what is found is remembered instead.
        seconds: of timed calls in each process.

    Raises:
        BundleError: the exported model can't be run here.
    """
    device: Device = "cuda" if resolve_device(candidate.lead.experiment.device).type == "cuda" else "cpu"
    machine, threads = machine_name(), usable_cpus()
    path = folder / f"{_key(recipe, candidate, [device, threads, machine])}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder / ".lock"):
        known = remembered(path)
        if not afresh and known is not None and (known.is_quiet or not quiet) and (known.trained or not trained):
            return known
        found = _measure(recipe, candidate, device, threads, processes=QUIET if quiet else 1, seconds=seconds)
        found = replace(found, machine=machine, trained=trained)
        with appearing(path) as partial:
            partial.write_text(found.to_json(), encoding="utf-8")
        return found


def remembered(path: Path) -> Costs | None:
    """Costs from a file; None where it isn't there or makes no sense (they are measured again then)."""
    try:
        return Costs.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def machine_name() -> str:
    """This machine: its node name, CPU and cores, and GPUs where it has some."""
    machine = Machine.here()
    gpus = f", {machine.gpus} GPU" if machine.gpus else ""
    return f"{platform.node() or 'this machine'} ({cpu_model()}, {machine.cpus} cores{gpus})"


def changes_costs(path: str) -> bool:
    """Whether the field of an experiment changes what its network costs to run."""
    section, _, name = path.partition(".")
    return (section == "model" and name != "pretrained") or path in ("train.patch_size", *_INPUT)


def _key(recipe: Recipe, candidate: Candidate, where: Sequence[Any]) -> str:
    """Of everything that changes what it costs; not of weights."""
    manifest, lead = recipe.manifest, candidate.lead.experiment
    models = [member.experiment.model.model_dump(mode="json", exclude={"pretrained"}) for member in candidate.members]
    facts = {
        "models": models,
        "task": [manifest.task, manifest.ndim, manifest.channels, outputs(manifest)],
        "input": [lead.train.patch_size, lead.preprocess.size, lead.preprocess.pad_multiple],
        "where": list(where),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _measure(
    recipe: Recipe, candidate: Candidate, device: Device, threads: int, *, processes: int, seconds: float
) -> Costs:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="medray-costs-") as place:
        directory = Path(place) / "bundle"
        write_champion(directory, recipe, candidate, None, name="costs", temperature=1.0, metrics={}, notes=())
        bundle = Bundle.open(directory)
        chosen = select(bundle, device=device, precision=None, threads=threads, remember=False)
        asked = {
            "bundle": str(directory),
            "engine": chosen.engine,
            "precision": chosen.precision,
            "device": device,
            "threads": threads,
            "seconds": seconds,
            "blocks": BLOCKS,
        }
        waited = time.monotonic()
        answers = [_in_a_process(asked) for _ in range(processes)]
        waited = time.monotonic() - waited
        files = bundle.spec.files
        served = [ONNX_NAME] if ONNX_NAME in files else [name for name in files if name.startswith("weights/")]
        shape = tuple(int(n) for n in bundle.golden()[0].shape[1:])
    blocks = [block for answer in answers for block in answer["blocks"]]
    calls = np.concatenate([np.asarray(block) for block in blocks]) * 1e3
    groups = np.concatenate([np.full(len(block), number) for number, block in enumerate(blocks)])
    peaks = [float(answer["peak_mb"]) for answer in answers]
    return Costs(
        engine=chosen.engine,
        precision=chosen.precision,
        fallen=chosen.fallback_reason,
        machine="",
        device=device,
        threads=threads,
        shape=shape,
        latency_ms=bootstrap(calls, np.median, groups=groups, n=400, method="percentile"),
        latency_p95_ms=bootstrap(calls, _p95, groups=groups, n=400, method="percentile"),
        fastest_ms=float(calls.min()),
        memory_mb=Interval(max(peaks), min(peaks), max(peaks)),
        size_mb=sum(files[name].bytes for name in served) / 1e6,
        parameters=sum(p.numel() for member in candidate.members for p in member.model.parameters()),
        processes=processes,
        calls=len(calls),
        others=float(np.mean([answer["others"] for answer in answers])),
        trained=False,
        seconds=time.monotonic() - began,
        process_seconds=waited / processes,
    )


def _p95(calls: Any) -> float:
    return float(np.percentile(calls, 95))


def _in_a_process(asked: dict[str, Any]) -> dict[str, Any]:
    """Run :mod:`medray.workflows.costs_process` and wait for its answer, within bounds."""
    command = [sys.executable, "-m", "medray.workflows.costs_process", json.dumps(asked)]
    # Wherever this process found medray, the child does too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE + 10 * asked["seconds"], env=environment
        )
    except subprocess.TimeoutExpired:
        raise BundleError(
            f"{asked['engine']} {asked['precision']} did not answer within {PATIENCE:.0f} s, so what the model costs "
            "is not known. Take a smaller one"
        ) from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]
        raise BundleError(
            f"what the model costs could not be measured: the process that ran it in {asked['engine']} "
            f"{asked['precision']} ended with {done.returncode} ({said})"
        ) from None
    if not answer["blocks"] or not math.isfinite(answer["peak_mb"]):
        raise BundleError(f"{asked['engine']}: no call was timed; run medray bench on a bundle to see why")
    return answer


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Two measurings on one machine would measure each other. A file system without locks goes without."""
    with path.open("a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
