"""Trials on Ray Tune. One object is Tune's searcher and scheduler at once; the study alone decides and remembers.

Tune's OptunaSearch can't tell a trial that was stopped early from one that ended, so Optuna would learn from values of
unfinished schedules. Here the hooks of both roles lead to one StudyDriver.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from medray import logs
from medray.engines.ray.session import quiet_environment
from medray.engines.ray.worker import MESSAGE, Message, TrialActor
from medray.errors import StudyError
from medray.search.driver import StudyDriver
from medray.search.trial import EventKind, TrialEvent, TrialFunction, TrialTask

OnEvent = Callable[[TrialEvent], None]

_GRACE_SECONDS = 15.0  # after the deadline, in which trials end by themselves
_SHORTEST = 0.95  # of a trial's seconds that must be left for another to begin


def run_trials(
    driver: StudyDriver,
    function: TrialFunction,
    *,
    directory: Path,
    cpus_per_trial: int,
    gpus_per_trial: float = 0.0,
    concurrency: int,
    in_group: bool = False,
    trial_seconds: float | None = None,
    deadline: float | None = None,
    before_trial: Callable[[], float] = lambda: 0.0,
    payload: Any = None,
    on_event: OnEvent | None = None,
) -> None:
    """Run the study's trials until there are none left or the time is up. Ray must be connected (``ray_session``).

    A trial whose process dies is run once more, from what lies in its folder; one that raises is recorded with its
    traceback, and the study goes on.

    Args:
        driver: the open study.
        function: trains one trial; importable by name. It runs in another process, reused for the next trial.
        directory: the study's folder; Ray's own scratch lies in ``.ray`` within it and is removed.
        cpus_per_trial: reserved, and the number of threads that the trial computes with.
        gpus_per_trial: reserved; may be a fraction.
        concurrency: trials at once, at most.
        in_group: the function starts a group of processes (``run_group``) that take these resources, and only waits.
        trial_seconds: what each trial may train for; none begins that could not end before the deadline.
        deadline: epoch seconds; running trials are told to stop then, and are stopped a little later.
        before_trial: seconds that the next trial may take until it trains, which count as its time too.
        payload: given to every trial as ``task.payload``; sent to each process once.
        on_event: told of all that happens, in this process.

    Raises:
        StudyError: the default trial, or each of the first, failed; carries the worker's traceback.
        KeyboardInterrupt: after a clean stop; unfinished trials come again when the study is resumed.
    """
    conductor = _Conductor(driver, cpus_per_trial, trial_seconds, deadline, before_trial, on_event or _ignore)
    # A bundle may not be empty: a byte is as little as can be asked for.
    bundle = {"memory": 1} if in_group else {"CPU": cpus_per_trial, "GPU": gpus_per_trial}
    resources = tune.PlacementGroupFactory([bundle])
    trainable = tune.with_resources(
        tune.with_parameters(TrialActor, function=function, payload=payload, where=logs.destination()),
        resources=resources,
    )
    scratch_root = Path(directory) / ".ray"
    scratch_root.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=scratch_root)
    try:
        with quiet_environment(), _quiet_logging(), _interrupts(conductor):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=conductor,
                    scheduler=conductor,
                    num_samples=-1,
                    max_concurrent_trials=concurrency,
                    reuse_actors=True,
                    trial_dirname_creator=_directory_name,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=scratch,
                    stop=_Stop(conductor),
                    failure_config=tune.FailureConfig(max_failures=1),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials write their own
                    verbose=0,
                ),
            ).fit()
    finally:
        shutil.rmtree(scratch_root, ignore_errors=True)
    if conductor.interrupted:
        raise KeyboardInterrupt
    if driver.fatal is not None:
        raise StudyError(driver.fatal)
    conductor.prune_running()


class _Conductor(Searcher, TrialScheduler):
    """Tune's searcher and scheduler; the study decides.

    Two of the hooks have the same name in both roles and differ in their arguments: the searcher's begins with the
    trial's id, the scheduler's with the controller. As read in Ray 2.60's TuneController: each result goes to the
    scheduler first, which alone may stop the trial; the searcher then hears of it, and of the end with ``error`` True
    only if no retry is left.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tuner stores its parts beside the run, but a study resumes from its own file, not from Ray's."""
        return {}

    def __init__(
        self,
        driver: StudyDriver,
        threads: int,
        trial_seconds: float | None,
        deadline: float | None,
        before_trial: Callable[[], float],
        on_event: OnEvent,
    ) -> None:
        Searcher.__init__(self)
        TrialScheduler.__init__(self)
        self.driver, self.deadline = driver, deadline
        self.interrupted = False
        self._before_trial = before_trial
        self._threads, self._trial_seconds, self._on_event = threads, trial_seconds, on_event
        self._tasks: dict[str, TrialTask] = {}  # by Tune's trial id
        self._began: dict[int, float] = {}
        self._deaths: dict[str, str] = {}

    # Both roles ------------------------------------------------------------------------------------------------------

    def set_search_properties(self, *_metric_and_mode: Any, **_spec: Any) -> bool:
        return True

    def on_trial_result(self, *call: Any) -> str | None:
        if isinstance(call[0], str):
            return None
        _controller, trial, result = call
        return self._hear(self._tasks[trial.trial_id], result[MESSAGE])

    def on_trial_complete(self, *call: Any, result: Any = None, error: bool = False) -> None:  # noqa: ARG002
        if not isinstance(call[0], str) or not error:
            return
        task = self._tasks[call[0]]
        if task.number in self.driver.running:
            self._fail(task, self._deaths[call[0]])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: study.db is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: study.db is the state."""

    # Searcher --------------------------------------------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.must_stop() or not self.driver.has_next:
            return Searcher.FINISHED
        seconds = self._trial_seconds
        if self.deadline is not None:
            share, left = self.driver.next_share, self.deadline - time.time()
            if share == 1.0:  # one that goes on has been looked at
                left -= self._before_trial()
            if left <= 0 or left < _SHORTEST * (seconds or 0.0) * share:
                return Searcher.FINISHED
            if seconds is not None and share == 1.0:
                seconds = min(seconds, left)
        task = self.driver.ask(seconds=seconds, deadline=self.deadline)
        if task is None:
            return Searcher.FINISHED
        self._tasks[trial_id] = task
        self._began[task.number] = time.monotonic()
        self._emit("started", task)
        return {"task": task, "threads": self._threads}

    # Scheduler -------------------------------------------------------------------------------------------------------

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        return next((trial for trial in tune_controller.get_trials() if trial.status == Trial.PENDING), None)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        if trial.trial_id not in self._deaths:
            return
        task, host = self._tasks[trial.trial_id], _host(trial)
        self.driver.lose(task.number, host)
        message = f"trial {task.number} was lost on {host} and is run again. {self._deaths[trial.trial_id]}"
        self._emit("retried", task, message=message)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:  # noqa: ARG002
        # What a trial's function raises comes as a message; an error of Tune's means that the process itself died.
        self._deaths[trial.trial_id] = _last_error(trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing: a trial that never began stays unfinished in the study."""

    def debug_string(self) -> str:
        return f"medray study {self.driver.directory.name}"

    # Ours ------------------------------------------------------------------------------------------------------------

    def must_stop(self) -> bool:
        """Whether all of it has to end now."""
        return self.interrupted or self.driver.fatal is not None

    def is_overdue(self) -> bool:
        """Whether trials have had their time, and the grace to end by themselves."""
        return self.deadline is not None and time.time() > self.deadline + _GRACE_SECONDS

    def prune_running(self) -> None:
        """End the trials that the deadline cut off."""
        for task in self._tasks.values():
            if task.number in self.driver.running:
                self.driver.prune(task.number, "deadline")
                self._emit("pruned", task, message="cut off at the deadline")

    def _hear(self, task: TrialTask, message: Message) -> str:
        if message.error is not None:
            self._fail(task, message.error)
            return TrialScheduler.STOP
        if message.outcome is not None:
            self.driver.complete(task.number, message.outcome)
            self._emit_end(task)
            return TrialScheduler.STOP
        report: dict[str, Any] = dict(message.report or {})
        try:
            fraction, metrics = float(report.pop("fraction")), dict(report.pop("metrics"))
            stop = self.driver.report(task.number, int(report.pop("step")), fraction, metrics, **report)
        except (KeyError, TypeError, ValueError, StudyError) as error:
            self._fail(task, f"the trial's report {message.report!r} can't be used: {error!r}")
            return TrialScheduler.STOP
        self._emit("progress", task, fraction=fraction, metrics=metrics)
        if not stop:
            return TrialScheduler.CONTINUE
        self.driver.prune(task.number)
        self._emit("pruned", task, fraction=fraction, metrics=metrics)
        return TrialScheduler.STOP

    def _fail(self, task: TrialTask, error: str) -> None:
        self.driver.fail(task.number, error)
        self._emit("failed", task, message=error)

    def _emit_end(self, task: TrialTask) -> None:
        """Say how the study took the outcome: completed, pruned (cut off), or failed (no finite objective)."""
        record = self.driver.record(task.number)
        kinds: dict[str, EventKind] = {"completed": "completed", "pruned": "pruned", "failed": "failed"}
        self._emit(
            kinds[record.state],
            task,
            fraction=record.fraction,
            metrics=dict(record.metrics),
            message=record.error or record.stopped,
        )

    def _emit(
        self,
        kind: EventKind,
        task: TrialTask,
        *,
        fraction: float = 0.0,
        metrics: dict[str, float] | None = None,
        message: str = "",
    ) -> None:
        self._on_event(
            TrialEvent(
                kind=kind,
                number=task.number,
                params=task.params,
                fraction=fraction,
                metrics=metrics or {},
                seconds=time.monotonic() - self._began[task.number],
                message=message,
            )
        )


class _Stop(tune.Stopper):
    """Ends the whole run: an interrupt, a study that can't go on, or trials that outlived the deadline."""

    def __init__(self, conductor: _Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._conductor.must_stop() or self._conductor.is_overdue()


def _last_error(trial: Trial) -> str:
    """What Ray says of a process that died, from the text that Tune appends to the trial's error file."""
    try:
        said = Path(trial.error_file or "").read_text(encoding="utf-8")
    except OSError:
        said = ""
    _before, _mark, last = said.rpartition("Failure # ")
    return "The trial's process died. " + (last.partition("\n")[2].strip() or "Ray does not say why.")


def _host(trial: Trial) -> str:
    """The machine on which a trial last ran, by the address that Ray knows it by."""
    return str((trial.last_result or {}).get("node_ip") or "an unknown machine")


def _directory_name(trial: Trial) -> str:
    return trial.trial_id


def _ignore(_event: TrialEvent) -> None:
    return None


@contextlib.contextmanager
def _interrupts(conductor: _Conductor) -> Iterator[None]:
    """The first Ctrl-C ends the run cleanly, a second one at once. Only the main thread hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        conductor.interrupted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """Tune's own log lines repeat what the study says, or speak of its internals."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
