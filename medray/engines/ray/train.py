"""One model trained by several processes: Ray Train starts them, brings the group back when one dies, and ends it.

The function that trains is the same as for one process, and so are its files: rank 0 writes the only checkpoint, from
which a group that was brought back goes on. Nothing of Ray's own checkpoints is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from medray import logs
from medray.engines.ray.session import quiet_environment
from medray.errors import MedrayError, TrainingError
from medray.train.progress import Progress
from medray.train.runtime import Runtime

_log = logging.getLogger(__name__)

GroupFunction = Callable[[Any, Runtime, Callable[[Progress], bool]], None]
"""Trains; called in each process with the task, its runtime, and whom to tell of progress (True: stop)."""

FAILURES = 3
"""Times that a group is brought back after a process or its machine died."""
_COLLECTIVE_SECONDS = 300  # a process that is gone without a trace (a cut cable) is noticed after this
_RESIZE_SECONDS = 60.0  # between looks for room for more processes
_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # the end of a group is noticed by polling
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# How long Ray Train waits for room for all processes. A machine may have to be started for them. A group that may be
# smaller is sized by what Ray believes to be there, which includes a machine that died seconds ago: better ask again.
_PLACED_SECONDS = {"fixed": "300", "elastic": "20"}
_MISPLACED = 5  # such waits for each loss: a dead machine counts as alive for up to a minute


@dataclass(frozen=True, kw_only=True)
class GroupSize:
    """Processes of a group, and what each is given.

    Attributes:
        workers: processes at the start.
        least: processes with which it goes on where there is no room for all of them any more, and begins where there
            is none yet; it grows again when there is.
        cpus: of each; also the threads that it computes with.
        gpus: of each, 0 or 1.
        sync_batchnorm: see :class:`~medray.engines.ray.group.GroupRuntime`.
    """

    workers: int
    least: int | None = None
    cpus: int = 1
    gpus: int = 0
    sync_batchnorm: bool = True

    @property
    def is_elastic(self) -> bool:
        """Whether fewer of them may go on."""
        return self.least is not None and self.least < self.workers


def run_group(
    function: GroupFunction,
    task: Any,
    size: GroupSize,
    *,
    on_progress: Callable[[Progress], bool] = lambda _: False,
    failures: int = FAILURES,
) -> None:
    """Run ``function`` in every process of a group, to its end. Ray must be connected (``ray_session``).

    Args:
        function: importable by name; what it makes lies in files.
        task: picklable.
        size: of the group.
        on_progress: called in this process with what rank 0 reports, which waits for the answer; True stops the run.
        failures: times that the group may be brought back.

    Raises:
        MedrayError: what the function raised, as it was raised.
        TrainingError: another error of the function, with the worker's traceback; or processes died too often.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    scratch = tempfile.mkdtemp(prefix="medray-group-")
    # Beside the driver: the loss of any other machine is one that the group survives.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_concurrency=size.workers + 2, scheduling_strategy=here)
    mailbox = remote(_Mailbox).remote()
    config = {
        "function": function, "task": task, "size": size, "mailbox": mailbox, "where": logs.destination(),
    }  # fmt: skip
    try:
        with quiet_environment(), _train_environment(size):
            ended = _fit_and_listen(lambda: _trainer(config, size, failures, scratch).fit(), mailbox, on_progress)
        failure = ray.get(mailbox.failure.remote())
        if failure is not None:
            raise failure.revive()
        if ended is not None:
            raise TrainingError(
                f"{size.workers} processes that trained together were lost more than {failures} times, the last time "
                f"by: {_last_line(ended)}. The run's checkpoint is whole: see the machines' memory and "
                f"logs, then go on with --resume"
            ) from ended
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"Ray itself ended while {size.workers} processes trained ({_last_line(error)}). The run's checkpoint is "
            f"whole: go on with --resume"
        ) from error
    finally:
        with contextlib.suppress(Exception):
            ray.kill(mailbox)
        shutil.rmtree(scratch, ignore_errors=True)


def _trainer(config: dict[str, Any], size: GroupSize, failures: int, scratch: str) -> Any:
    """Ray's trainer of the group; it keeps nothing of its own but a marker in ``scratch``."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _work,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if size.gpus else "gloo", timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=(size.least, size.workers) if size.is_elastic else size.workers,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
            use_gpu=bool(size.gpus),
            resources_per_worker={"CPU": size.cpus, **({"GPU": size.gpus} if size.gpus else {})},
        ),
        run_config=RunConfig(
            name="group",
            storage_path=scratch,
            failure_config=FailureConfig(
                max_failures=failures, controller_failure_limit=_MISPLACED * failures if size.is_elastic else failures
            ),
        ),
    )


def _fit_and_listen(
    fit: Callable[[], object], mailbox: Any, on_progress: Callable[[Progress], bool]
) -> BaseException | None:
    """Answer what the group reports until ``fit`` has ended; the error that it ended with."""
    import ray

    ended: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            ended.append(error)

    # In a thread: in the main one Ray Train would take SIGINT for itself, for good.
    thread = threading.Thread(target=run, name="medray-group", daemon=True)
    thread.start()
    while thread.is_alive():
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            said = ray.get(mailbox.next.remote(0.5), timeout=30.0)
            if said is not None:
                number, progress = said
                ray.get(mailbox.answer.remote(number, bool(on_progress(progress))))
    return ended[0] if ended else None


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An error as it travels: exceptions with arguments of their own don't survive being pickled."""

    kind: type[BaseException]
    text: str
    trace: str
    attributes: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        trace = "".join(traceback.format_exception(error))
        ours = isinstance(error, MedrayError)
        return cls(
            kind=type(error) if ours else Exception,
            text=str(error),
            trace=trace,
            attributes=dict(vars(error)) if ours else {},
        )

    def revive(self) -> MedrayError:
        if not issubclass(self.kind, MedrayError):
            return TrainingError(f"training failed in a worker process:\n{self.trace}")
        error = self.kind.__new__(self.kind)
        Exception.__init__(error, self.text)
        error.__dict__.update(self.attributes)
        return error


class _Mailbox:
    """Between the driver and its group: an actor of its own, which outlives processes of the group."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._count = 0
        self._failure: _Failure | None = None

    async def tell(self, progress: Progress) -> bool:
        """Rank 0 reports; it goes on when the driver has answered."""
        self._count += 1
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._answers[self._count] = answer
        await self._queue.put((self._count, progress))
        return await answer

    async def next(self, seconds: float) -> tuple[int, Progress] | None:
        """The driver asks for the next report; None if none comes."""
        try:
            return await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None

    async def answer(self, number: int, stop: bool) -> None:
        """The driver answers a report."""
        answer = self._answers.pop(number)
        if not answer.done():
            answer.set_result(stop)

    async def fail(self, failure: _Failure) -> None:
        """A process ends by an error that would come again; the first one counts."""
        self._failure = self._failure or failure

    async def failure(self) -> _Failure | None:
        return self._failure


def _work(config: dict[str, Any]) -> None:
    """What each process of the group runs."""
    import ray
    import ray.train.torch
    import torch

    from medray.engines.ray.group import GroupRuntime

    size, mailbox = config["size"], config["mailbox"]
    if ray.get(mailbox.failure.remote()) is not None:
        return  # brought back for nothing: it would fail again
    torch.set_num_threads(size.cpus)
    runtime = GroupRuntime(ray.train.torch.get_device(), sync_batchnorm=size.sync_batchnorm)
    logs.join(config["where"], rank=runtime.lane)
    if runtime.is_main:
        fewer = runtime.size < size.workers
        _log.log(
            logging.WARNING if fewer else logging.INFO,
            f"{runtime.size} of {size.workers} processes train"
            + (": the others' machines are gone, or taken; the batch is shared among these" if fewer else ""),
        )

    def report(progress: Progress) -> bool:
        return bool(ray.get(mailbox.tell.remote(progress)))

    try:
        config["function"](config["task"], runtime, report)
    except BaseException as error:
        if not _is_lost_peer(error):
            ray.get(mailbox.fail.remote(_Failure.of(error)))
        raise


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: that process, or the next group, knows why."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _train_environment(size: GroupSize) -> Iterator[None]:
    """Ray Train's settings, which the controller inherits from this process; what the user has set wins."""
    wait = _PLACED_SECONDS["elastic" if size.is_elastic else "fixed"]
    settings = _TRAIN | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": wait}
    changed = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key in changed:
            os.environ.pop(key, None)
