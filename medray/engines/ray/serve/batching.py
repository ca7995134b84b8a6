"""Requests that run through the network together.

A prediction runs on a thread of its own and hands its arrays, windows of a volume or a whole image, to the batch of its
model; Ray Serve's batching gathers what waits, within a budget of voxels, and the engine runs it on one thread, away
from the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from medray.config.serving import BatchingConfig
from medray.errors import ServingError
from medray.predict.predictor import Floats, Predictor

Told = Callable[[int, int, float], None]
"""(requests in the batch, samples in it, seconds of the engine)"""


def run_together(
    engine: Callable[[Floats], Floats], arrays: list[Floats], told: Told, budget: int | None = None
) -> list[Floats | Exception]:
    """Run arrays (B_i, C, *s) of several requests, those of one shape as one batch.

    A batch that fails is run again one by one, so that only the request at fault fails.

    Args:
        engine: of the model.
        arrays: of the requests.
        told: of each run.
        budget: of voxels in a run, channels counted; what is larger is run in parts. None: there is none.
    """
    answers: list[Floats | Exception] = [RuntimeError("not run")] * len(arrays)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, array in enumerate(arrays):
        groups.setdefault(array.shape[1:], []).append(index)
    for members in groups.values():
        begin = time.perf_counter()
        try:
            joined = np.concatenate([arrays[index] for index in members]) if members[1:] else arrays[members[0]]
            logits = _run(engine, joined, budget)
            edges = np.cumsum([len(arrays[index]) for index in members])[:-1]
            for index, part in zip(members, np.split(logits, edges), strict=True):
                answers[index] = part
        except Exception as error:
            for index in members:
                answers[index] = error if not members[1:] else _alone(engine, arrays[index], budget)
        told(len(members), sum(len(arrays[index]) for index in members), time.perf_counter() - begin)
    return answers


def _run(engine: Callable[[Floats], Floats], array: Floats, budget: int | None) -> Floats:
    """(B, C, *s) to logits, no more than the budget at once.

    Raises:
        ServingError: the engine gave another number of rows: whose they are can't be told.
    """
    rows = len(array) if budget is None else max(1, budget // max(1, array[0].size))
    parts = []
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        parts.append(engine(part))
        if len(parts[-1]) != len(part):
            raise ServingError(f"the engine answered {len(parts[-1])} rows for {len(part)}")
    return np.concatenate(parts) if parts[1:] else parts[0]


def _alone(engine: Callable[[Floats], Floats], array: Floats, budget: int | None) -> Floats | Exception:
    try:
        return _run(engine, array, budget)
    except Exception as error:
        return error


class DirectBatcher:
    """No batching: each array runs by itself, in turn. For servers without Ray, such as those of tests.

    Args:
        engine: of the model.
        told: of each run.
    """

    def __init__(self, engine: Predictor, told: Told) -> None:
        self.engine, self._told = engine, told
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def __call__(self, array: Floats) -> Floats:
        """(B, C, *s) to logits; called from any thread."""
        return _one(self._executor.submit(run_together, self.engine, [array], self._told).result())

    async def infer(self, array: Floats) -> Floats:
        """The same, from the event loop."""
        return await asyncio.to_thread(self, array)

    def close(self) -> None:
        """End the engine's thread."""
        self._executor.shutdown(wait=False)


def _one(answers: list[Floats | Exception]) -> Floats:
    (answer,) = answers
    if isinstance(answer, Exception):
        raise answer
    return answer


class ServeBatcher:
    """Ray Serve's batching around one engine; made on the replica's event loop.

    Args:
        engine: of the model.
        told: of each run.
        config: the budget, and how long one waits for others.
        loop: of the replica.
    """

    def __init__(
        self, engine: Predictor, told: Told, *, config: BatchingConfig, loop: asyncio.AbstractEventLoop
    ) -> None:
        from ray import serve

        self.engine, self._loop = engine, loop
        executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._executor = executor
        # What is larger than the budget runs alone, in parts: Serve would refuse an item that exceeds it.
        budget = config.voxels

        def voxels(items: list[Floats]) -> int:
            return min(budget, sum(item.size for item in items)) if len(items) == 1 else sum(i.size for i in items)

        async def infer(arrays: list[Floats]) -> list[Any]:
            return await loop.run_in_executor(executor, run_together, engine, arrays, told, budget)

        self._infer = serve.batch(
            infer, max_batch_size=budget, batch_wait_timeout_s=config.wait_ms / 1000, batch_size_fn=voxels
        )

    async def infer(self, array: Floats) -> Floats:
        """(B, C, *s) to logits, from the event loop."""
        return await self._infer(array)

    def __call__(self, array: Floats) -> Floats:
        """The same, from a thread of its own."""
        return asyncio.run_coroutine_threadsafe(self._infer(array), self._loop).result()

    def close(self) -> None:
        """End the engine's thread, once it has run what waits."""
        self._executor.shutdown(wait=False)
