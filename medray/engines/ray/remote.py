"""Run one function in a worker process of the cluster, and wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from medray import logs

T = TypeVar("T")

RETRIES = 2
"""A worker that dies (out of memory, a node lost) is replaced this often; what it runs goes on from its checkpoint."""


def call_all(
    function: Callable[[Any], T],
    tasks: Sequence[Any],
    *,
    cpus: float,
    gpus: float = 0,
    while_waiting: Callable[[], None] = lambda: None,
) -> list[T]:
    """Run ``function(task)`` for each task, as many at once as the cluster has room for.

    Args:
        function: importable by name.
        tasks: picklable; one call each.
        cpus, gpus: that one call takes; its thread count follows.
        while_waiting: called about once a second.

    Returns:
        The results in the order of ``tasks``.

    Raises:
        Exception: whatever ``function`` raised first, as it was raised in the worker.
    """
    import ray

    environment = {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus)))}}
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, runtime_env=environment)(_call)
    where = logs.destination()
    references = [remote.options(name=function.__name__).remote(function, task, where) for task in tasks]
    pending = list(references)
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
            while_waiting()
            for reference in ready:
                ray.get(reference)  # raises at once, so that the others don't run on for nothing
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
    return [ray.get(reference) for reference in references]


def _call(function: Callable[[Any], T], task: Any, where: logs.Destination | None) -> T:
    logs.join(where)
    return function(task)
