"""The study's SQLite file: opened by one process at a time, safe to kill at any instant."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import optuna
from optuna.storages._rdb.models import TrialIntermediateValueModel, TrialSystemAttributeModel
from sqlalchemy import delete, insert
from sqlalchemy.pool import QueuePool

from medray.errors import StudyError

DATABASE = "study.db"
_LOCK = ".study.lock"


class StudyFile:
    """``study.db`` in a study's folder, on a local disk, held for this process alone.

    Args:
        directory: the study's folder.

    Raises:
        StudyError: another process runs the study, or the file is no study of Optuna's.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / DATABASE
        self._lock = _acquire(directory / _LOCK)
        try:
            self.storage = self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> optuna.storages.RDBStorage:
        database = str(self.path.absolute())

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(database, timeout=60.0, check_same_thread=False)
            # The log is not forced to disk at each write, which a killed process survives; sync() is for power cuts.
            connection.execute("PRAGMA synchronous=NORMAL")
            return connection

        try:
            with contextlib.closing(connect()) as connection:
                # Readers (optuna-dashboard) and the writer don't block each other; a kill leaves a log to replay.
                connection.execute("PRAGMA journal_mode=WAL")
            # The connection is made here, not from the URL, in which a path with ?, # or % would be misread.
            return optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": QueuePool})
        except Exception as error:
            raise StudyError(
                f"{self.path} can't be opened as a study ({error}). It must lie on a local disk and have been written "
                f"by medray; move it away to begin anew"
            ) from error

    def sync(self) -> None:
        """Force all that was written to the disk: it outlives a power cut from now on."""
        for path in (self.path, self.path.with_name(f"{DATABASE}-wal")):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                os.fsync(file.fileno())

    def replace_system_attributes(self, prefix: str, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Give trials other system attributes of one kind than they have, all at once; trials that have ended, too.

        Optuna itself refuses to change those. What it has read of them already it does not read again.

        Args:
            prefix: begins the names of all attributes of the kind.
            rows: by Optuna's id of the trial, name to value.
        """
        table = TrialSystemAttributeModel
        with self.storage.engine.begin() as connection:
            for trial, values in rows.items():
                old = delete(table).where(table.trial_id == trial, table.key.startswith(prefix, autoescape=True))
                connection.execute(old)
                for name, value in values.items():
                    row = {"trial_id": trial, "key": name, "value_json": json.dumps(value, allow_nan=False)}
                    connection.execute(insert(table).values(**row))

    def replace_intermediate_values(self, trial: int, values: Mapping[int, float]) -> None:
        """Give a running trial these intermediate values, and no others; Optuna itself can't take one back.

        Args:
            trial: Optuna's id of it.
            values: finite, by step.
        """
        table = TrialIntermediateValueModel
        with self.storage.engine.begin() as connection:
            connection.execute(delete(table).where(table.trial_id == trial))
        for step, value in values.items():
            self.storage.set_trial_intermediate_value(trial, step, value)

    def close(self) -> None:
        """Fold the write-ahead log into the file, so that study.db alone is the study, and let others open it."""
        if self._lock.closed:
            return
        self.storage.remove_session()
        self.storage.engine.dispose()
        try:
            with contextlib.closing(sqlite3.connect(str(self.path), timeout=60.0)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._lock.close()


class MemoryFile:
    """A study that is kept nowhere: to a driver the same as :class:`StudyFile`, and gone with it. For simulations."""

    def __init__(self) -> None:
        self.storage = optuna.storages.InMemoryStorage()

    def replace_system_attributes(self, prefix: str, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Nothing to do: nobody resumes such a study."""

    def replace_intermediate_values(self, trial: int, values: Mapping[int, float]) -> None:
        """As of :class:`StudyFile`."""
        self.storage.get_trial(trial).intermediate_values = dict(values)  # it is the stored trial, no copy

    def sync(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


def _acquire(path: Path) -> IO[str]:
    # The kernel lets go of the lock when the process ends, however it ends.
    lock = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise StudyError(
            f"{path.parent} is being run by another process (id {owner}); wait for it or stop it, then try again"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock
