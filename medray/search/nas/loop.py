"""The search itself: batches of both halves to a strategy, until the time or the steps are over; with checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.config.genotype import Genotype
from medray.errors import ConfigError, NonFiniteLossError, StudyError
from medray.search.nas.strategy import Batch, Problem, Strategy
from medray.train import checkpoint
from medray.train.fit import CHECKPOINT, Batches
from medray.train.seeding import get_rng, seed_everything, set_rng

__all__ = ["RESULT", "Found", "load_found", "search"]

RESULT = "result.json"
CHECKPOINT_SECONDS = 20.0
FINISH = 0.05
"""Share of the time that a strategy has to decide in the end."""
ROWS = 200
"""Of the history, at most: then every second one goes."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
        genotypes: best first.
        steps: taken.
        seconds: of all sittings.
        history: figures by step.
    """

    genotypes: tuple[Genotype, ...]
    steps: int
    seconds: float
    history: tuple[Mapping[str, float], ...]


def search(
    problem: Problem,
    make: Callable[[Problem], Strategy],
    *,
    train: Batches,
    held: Batches,
    directory: Path,
    asked: str,
    seconds: float,
    steps: int | None = None,
) -> Found:
    """Search, or go on from the checkpoint in ``directory``; the main process writes ``result.json`` at the end.

    Args:
        problem: super-network, loss, runtime.
        make: the strategy.
        train, held: loaders of the two halves of the training cases, whole batches in every process's own share.
        directory: of the search alone.
        asked: a digest of what was asked for; a checkpoint of something else is refused.
        seconds: wall clock of all sittings, the end included.
        steps: at most; None for as many as fit.

    Raises:
        StudyError: the checkpoint is of another search, or a loader is empty.
        NonFiniteLossError: the search diverged.
    """
    if not len(train) or not len(held):
        raise StudyError("an architecture search needs training cases for weights and for architecture: add cases")
    begun, runtime = time.monotonic(), problem.runtime
    seed_everything(problem.seed + runtime.lane)
    strategy = make(problem)
    path = directory / CHECKPOINT
    step, earlier, history = 0, 0.0, list[dict[str, float]]()
    state = runtime.from_main(checkpoint.load(path) if runtime.is_main else None)
    if state is not None:
        if state["asked"] != asked:
            raise StudyError(f"{path}: a checkpoint of another architecture search. Delete it to search anew")
        strategy.load_state_dict(state["strategy"])
        step, earlier, history = int(state["step"]), float(state["seconds"]), list(state["history"])
        if runtime.is_main:
            set_rng(state["rng"])
        else:
            seed_everything(problem.seed + runtime.lane + 7919 * step)

    def elapsed() -> float:
        return earlier + time.monotonic() - begun

    def save() -> None:
        if runtime.is_main:
            kept = {"strategy": strategy.state_dict(), "step": step, "seconds": elapsed(), "history": history}
            checkpoint.save(path, {"asked": asked, "rng": get_rng(), **kept})

    usable = max(1e-3, seconds * (1.0 - FINISH))
    saved = time.monotonic()
    batches = zip(_endless(train, step), _endless(held, step), strict=True)
    while (progress := runtime.from_main(_progress(step, steps, elapsed(), usable))) < 1.0:
        one, other = next(batches)
        figures = strategy.step(one, other, progress)
        if not all(math.isfinite(value) for value in figures.values()):
            raise NonFiniteLossError(
                f"the architecture search diverged at step {step} ({figures}): lower study.nas.architecture_lr, or set "
                "train.precision=fp32"
            )
        history.append({"step": float(step), "progress": progress, "seconds": elapsed(), **figures})
        step += 1
        if len(history) > ROWS:
            del history[::2]
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save()
            saved = time.monotonic()
    genotypes = strategy.finish(_endless(held, step))
    found = Found(genotypes=genotypes, steps=step, seconds=elapsed(), history=tuple(history))
    if runtime.is_main:
        _write(directory, found)
    return found


def _progress(step: int, steps: int | None, elapsed: float, usable: float) -> float:
    return max(elapsed / usable, step / steps if steps else 0.0)


def _endless(loader: Batches, first: int) -> Iterator[Batch]:
    """Batch after batch, from number ``first`` on."""
    epoch, position = divmod(first, len(loader))
    for number in itertools.count(epoch):
        loader.set_epoch(number)
        yield from itertools.islice(loader, position if number == epoch else 0, None)


def _write(directory: Path, found: Found) -> None:
    found.genotypes[0].save(directory / "genotype.json")
    content: dict[str, Any] = {
        "genotypes": [genotype.name for genotype in found.genotypes],
        "steps": found.steps,
        "seconds": found.seconds,
        "history": [dict(row) for row in found.history],
    }
    partial = directory / f"{RESULT}.part"
    partial.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    partial.replace(directory / RESULT)


def load_found(directory: Path) -> Found | None:
    """A search that has ended, from its folder; None where it has not.

    Raises:
        StudyError: its file is damaged.
    """
    path = directory / RESULT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        genotypes = tuple(Genotype.of(str(name)) for name in content["genotypes"])
        if not genotypes:
            raise ValueError("no genotype")
        return Found(
            genotypes=genotypes,
            steps=int(content["steps"]),
            seconds=float(content["seconds"]),
            history=tuple(content["history"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise StudyError(f"{path} is damaged ({error}). Delete the folder to search the architecture anew") from None
