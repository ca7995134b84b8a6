"""What runs inside a trial's process: its function on a thread of its own, each report handed to Tune as one step."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

from ray import tune

from medray import logs
from medray.search.trial import TrialFunction, TrialOutcome, TrialReport, TrialTask

MESSAGE = "message"
"""Key under which a step's result carries its Message (an object, so that Tune does not flatten it)."""
_UNWIND_SECONDS = 120.0  # that a function told to stop may take to return before its process is given up
_COMPLETE = 0.999


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a trial tells the study: exactly one of a report, an outcome, an error (the traceback)."""

    report: TrialReport | None = None
    outcome: TrialOutcome | None = None
    error: str | None = None


class _Run:
    """One trial's function on its thread. ``next()`` gives its messages; each report waits for the answer to it."""

    def __init__(self, function: TrialFunction, task: TrialTask, threads: int) -> None:
        self._function, self._task, self._threads = function, task, threads
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._waiting = False
        self._stopping = False
        self._past_deadline = False
        self._thread = threading.Thread(target=self._main, name=f"trial-{task.number}", daemon=True)
        self._thread.start()

    def next(self) -> Message:
        """Let the function go on and wait for what it says next."""
        if self._waiting:
            self._waiting = False
            self._answers.put(False)
        message = self._messages.get()
        self._waiting = message.report is not None
        return message

    def stop(self, timeout: float) -> bool:
        """Have the function's report() answer True; whether it has returned within ``timeout`` seconds."""
        self._stopping = True
        self._answers.put(True)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _report(self, report: TrialReport) -> bool:
        if self._stopping:
            return True
        self._messages.put(Message(report=report))
        if self._answers.get():
            return True
        late = self._task.deadline is not None and time.time() > self._task.deadline
        self._past_deadline = late and report.get("fraction", 0.0) < _COMPLETE
        return self._past_deadline

    def _main(self) -> None:
        # The thread count of OpenMP belongs to a thread: it has to be set on the one that trains.
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self._threads)
        started = time.monotonic()
        try:
            outcome = self._function(self._task, self._report)
            if not isinstance(outcome, TrialOutcome):
                raise TypeError(f"a trial's function must return a TrialOutcome, not {type(outcome).__name__}")
            outcome = replace(outcome, seconds=outcome.seconds or time.monotonic() - started)
            if self._past_deadline:
                outcome = replace(outcome, stopped="deadline")
            self._messages.put(Message(outcome=outcome))
        except BaseException as error:
            frames = error.__traceback__.tb_next if error.__traceback__ else None  # begin at the trial's own function
            text = "".join(traceback.format_exception(type(error), error, frames))
            self._messages.put(Message(error=text))


class TrialActor(tune.Trainable):
    """Tune's trainable. ``config`` holds ``task`` and ``threads``; one process runs many trials after each other."""

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        # Before the trial's function is unpickled, which imports torch: OpenMP reads it once.
        os.environ["OMP_NUM_THREADS"] = str(config["threads"])
        self._run: _Run | None = None
        super().__init__(config, **options)

    def setup(
        self, config: dict[str, Any], *, function: TrialFunction, payload: Any, where: logs.Destination | None = None
    ) -> None:
        """What all trials of this process share; they log to ``where``."""
        self._function, self._payload, self._where = function, payload, where
        self._config = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make ready for another trial in the same process, once the former has unwound."""
        if self._run is not None and not self._run.stop(_UNWIND_SECONDS):
            return False
        self._config, self._run = new_config, None
        return True

    def step(self) -> dict[str, Any]:
        """The trial's next message; the first call begins it.

        Not the constructor: while a process starts, Tune may give its trial to one that has become free.
        """
        if self._run is None:
            self._run = self._begin(self._config)
        return {MESSAGE: self._run.next()}

    def cleanup(self) -> None:
        """Tell the function to stop; it is not waited for, since a checkpoint is safe to kill at any instant."""
        if self._run is not None:
            self._run.stop(1.0)

    def _begin(self, config: dict[str, Any]) -> _Run:
        task: TrialTask = config["task"]
        logs.join(self._where, trial=task.number)
        return _Run(self._function, replace(task, payload=self._payload), config["threads"])
