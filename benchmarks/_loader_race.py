"""Who makes an epoch of batches soonest, and in how much memory? The contenders of `loader`, each in its process."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OURS, PROCESSES = "medray", "medray, processes"
CACHE, PERSISTENT = "MONAI CacheDataset", "MONAI PersistentDataset"
CONTENDERS = (OURS, PROCESSES, CACHE, PERSISTENT)


@dataclass(kw_only=True)
class Passes:
    """What one contender did with so many loader workers.

    Attributes:
        first: seconds of its first epoch, with all that had to be prepared before.
        rates: samples a second of each later one.
        memory: MiB of physical memory of all its processes, while no other contender was there.
    """

    first: float
    rates: list[float] = field(default_factory=list)
    memory: float = 0.0


def race(
    contenders: Sequence[str], table: str, explicit: Mapping[str, Any], workers: int, rounds: int
) -> dict[str, Passes]:
    """Contenders on one data set, epoch by epoch in turn; then each alone, for its memory.

    Args:
        contenders: of :data:`CONTENDERS`.
        table: the data, as files.
        explicit: of the experiment, with what the plan gave.
        workers: of each loader.
        rounds: later epochs of each.
    """
    with tempfile.TemporaryDirectory() as folder, _started(contenders, table, explicit, workers, folder) as pipes:
        found = {name: Passes(first=_ask(pipe, "first", name)) for name, pipe in pipes.items()}
        for number in range(rounds):
            turn = list(pipes.items()) if number % 2 else list(pipes.items())[::-1]
            for name, pipe in turn:
                found[name].rates.append(_ask(pipe, "epoch", name))
    for name, passes in found.items():
        with tempfile.TemporaryDirectory() as folder, _started([name], table, explicit, workers, folder) as pipes:
            _ask(pipes[name], "first", name)
            _ask(pipes[name], "epoch", name)
            passes.memory = _ask(pipes[name], "memory", name)
    return found


@contextmanager
def _started(
    names: Sequence[str], table: str, explicit: Mapping[str, Any], workers: int, folder: str
) -> Iterator[dict[str, Connection]]:
    # The server has the libraries imported, and has computed nothing: its children are alike, and quick to begin.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["medray.data.loader", "medray.data.layouts", "monai.transforms", "monai.data"])
    running: dict[str, tuple[Any, Connection]] = {}
    try:
        for name in names:
            here, there = context.Pipe()
            place = Path(folder) / name.replace(" ", "-").replace(",", "")
            process = context.Process(target=_contend, args=(name, table, explicit, workers, place, there))
            process.start()
            there.close()
            running[name] = (process, here)
        yield {name: pipe for name, (_, pipe) in running.items()}
    finally:
        for process, pipe in running.values():
            if process.is_alive():
                pipe.close()  # which ends it, and its workers with it
            process.join(20)
            process.kill()


def _ask(pipe: Connection, what: str, name: str) -> float:
    pipe.send(what)
    try:
        return float(pipe.recv())
    except EOFError:
        raise RuntimeError(f"the process of {name} ended; its traceback stands above") from None


def _contend(name: str, table: str, explicit: Mapping[str, Any], workers: int, folder: Path, pipe: Connection) -> None:
    batches: Any = None
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            break
        if asked == "memory":
            pipe.send(_memory())
            continue
        started = time.perf_counter()
        if asked == "first":
            batches = _loader(name, table, explicit, workers, folder)
        elif name in (OURS, PROCESSES):
            batches.set_epoch(batches._epoch + 1000)  # what it made ahead while others had their turn doesn't count
        samples = _pass(batches)
        seconds = time.perf_counter() - started
        pipe.send(seconds if asked == "first" else samples / seconds)
    del batches


def _pass(batches: Iterable[Mapping[str, Any]]) -> int:
    return sum(len(batch["image"]) for batch in batches)


def _loader(name: str, table: str, explicit: Mapping[str, Any], workers: int, folder: Path) -> Any:
    from benchmarks._monai_loader import loader
    from medray.config.compose import build_experiment
    from medray.data.cache import PreparedStore
    from medray.data.layouts import build_manifest
    from medray.data.loader import train_loader

    manifest, experiment = build_manifest(table), build_experiment(dict(explicit))
    patch = experiment.train.patch_size or experiment.preprocess.size
    if name not in (OURS, PROCESSES):
        assert patch is not None
        return loader(name.split()[1], manifest, experiment, patch, workers, folder)
    store = PreparedStore.open_or_build(manifest, experiment.preprocess, folder)
    return train_loader(
        store,
        range(len(store)),
        experiment,
        kind=manifest.task,
        num_classes=len(manifest.classes),
        workers=workers,
        processes=name == PROCESSES,
    )


def _memory() -> float:
    """MiB of this process, its workers, and the server that holds their imports: pages that several have count once."""
    import psutil

    server = psutil.Process(os.getppid())
    family = [server, *server.children(recursive=True)]
    return float(sum(process.memory_full_info().pss for process in family)) / 2**20
