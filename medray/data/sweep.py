"""Run over all cases with a few threads: in order, and with no more than a handful of results waiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Progress = Callable[[int, int, str], None]
"""(done, all, name of what was done last)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def sweep(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Progress | None = None,
    *,
    name: Callable[[Item], str] = str,
    threads: int | None = None,
) -> Iterator[Result]:
    """``work`` over ``items`` in order.

    At most two items a thread are in flight, so memory holds a few cases however many there are. The first exception
    ends the sweep; what was not begun is not begun.
    """
    workers = threads or min(
        4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with ThreadPoolExecutor(workers, thread_name_prefix="medray-sweep") as pool:
        waiting: deque[tuple[Item, Future[Result]]] = deque()
        ahead = iter(items)
        done = 0
        try:
            while True:
                while len(waiting) < 2 * workers:
                    try:
                        item = next(ahead)
                    except StopIteration:
                        break
                    waiting.append((item, pool.submit(work, item)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                result = future.result()
                done += 1
                if progress is not None:
                    progress(done, len(items), name(item))
                yield result
        finally:
            for _, future in waiting:
                future.cancel()
