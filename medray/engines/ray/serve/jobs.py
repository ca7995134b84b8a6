"""Predictions that a client doesn't wait for: their state and, for a while, their answers, as files.

    state/jobs/<id>.json     who asked, what, how far it is; rewritten as it goes on
    state/jobs/<id>.lock     held by the process that computes it, so that another can tell a lost job from a long one
    state/jobs/<id>.answer   what was answered
    state/jobs/<id>.gone     it was removed while it ran: what it comes to is not written down

Every replica that shares the folder can tell of every job.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Literal

from medray.data.writers.atomic import appearing
from medray.engines.ray.serve.journal import Kept
from medray.engines.ray.serve.refusal import RefusedError, key_reused

State = Literal["running", "done", "failed", "lost"]
_ID = re.compile(r"[0-9a-f]{32}")
_SWEEP_SECONDS = 30.0
_TELL_SECONDS = 0.5


class Jobs:
    """All jobs of a server.

    Args:
        folder: private; is made.
        seconds: for how long an ended job is kept.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder, self._seconds = folder, seconds
        self._swept = 0.0

    def begin(self, who: str, asked: str, idempotency: str | None) -> tuple[str, Running | None]:
        """A job's id, and the job to be computed; None where the same request was made before.

        Args:
            who: the id of the API key; no other key can ask for the job.
            asked: hash of all that was asked.
            idempotency: the client's key: a repeated request finds the job that the first one began.

        Raises:
            RefusedError: 422, the Idempotency-Key was another request's; 409, it is just being begun or ended.
        """
        token = secrets.token_hex(16)
        if idempotency is not None:
            token = hashlib.sha256(f"{who}\0{idempotency}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
        lock, held = self._take(token)
        try:
            known = self._read(token)
            if known is not None and known["asked"] != asked:
                raise key_reused()
            if not held and (known is None or known["state"] != "running"):
                # It begins, ends or is looked at in this moment.
                raise RefusedError(409, "in-flight", "this job is being begun or ended; ask again", retry_after=1)
            # One that failed or was lost is computed anew, as a repeated prediction is.
            is_done = known is not None and known["state"] == "done" and (self._folder / f"{token}.answer").exists()
            if not held or is_done:
                os.close(lock)
                return token, None
            (self._folder / f"{token}.gone").unlink(missing_ok=True)
            return token, Running(self._folder, token, lock, who=who, asked=asked)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(lock)
            raise

    def state(self, who: str, token: str) -> dict[str, Any]:
        """What is known of a job: ``id``, ``state``, ``progress`` (0 to 1), ``created``, ``error``.

        ``lost``: the process that computed it ended before it had an answer.

        Raises:
            RefusedError: 404, there is none of this id that this key began.
        """
        document = self._read(token)
        if document is None or document["who"] != who:
            raise _no_such()
        state: State = document["state"]
        error = document["error"]
        if state == "running" and self._is_free(token):
            again = self._read(token)  # it may have ended between the two looks
            if again is not None and again["state"] != "running":
                state, error = again["state"], again["error"]
            else:
                state = "lost"
                error = {"reason": "lost", "message": "the process that computed it has ended; send the image again"}
        progress = 1.0 if state == "done" else float(document["progress"])
        return {"id": token, "state": state, "progress": progress, "created": document["created"], "error": error}

    def answer(self, who: str, token: str) -> Kept:
        """What a job has come to.

        Raises:
            RefusedError: 404, there is no such job; 409, it still runs; or what refused the image.
        """
        found = self.state(who, token)
        if found["state"] == "running":
            raise RefusedError(409, "running", f"{found['progress']:.0%} done; ask again", retry_after=1)
        if found["state"] == "lost":
            raise RefusedError(503, "lost", found["error"]["message"], retry_after=1)
        if found["state"] == "failed":
            error = found["error"]
            raise RefusedError(int(error["status"]), error["reason"], error["message"])
        try:
            with (self._folder / f"{token}.answer").open("rb") as file:
                head = json.loads(file.readline())
                return Kept(status=head["status"], headers=head["headers"], body=file.read())
        except (OSError, ValueError, KeyError):
            raise _no_such() from None

    def forget(self, who: str, token: str) -> None:
        """Remove an ended job and its answer; one that runs is computed to its end, and then nobody can ask for it.

        Raises:
            RefusedError: 404, there is no such job.
        """
        self.state(who, token)
        if not self._is_free(token):
            (self._folder / f"{token}.gone").touch(mode=0o600)
        for suffix in ("json", "answer"):
            (self._folder / f"{token}.{suffix}").unlink(missing_ok=True)

    def _read(self, token: str) -> dict[str, Any] | None:
        if not _ID.fullmatch(token):
            return None
        path = self._folder / f"{token}.json"
        try:
            old = time.time() - path.stat().st_mtime > self._seconds
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return None if old and document["state"] != "running" else document

    def _take(self, token: str) -> tuple[int, bool]:
        """The lock's descriptor, and whether it is held now. One that was swept meanwhile is made anew."""
        path = self._folder / f"{token}.lock"
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not _lock(lock):
                return lock, False
            with contextlib.suppress(OSError):
                if os.fstat(lock).st_ino == path.stat().st_ino:
                    return lock, True
            os.close(lock)

    def _is_free(self, token: str) -> bool:
        try:
            descriptor = os.open(self._folder / f"{token}.lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            return _lock(descriptor)
        finally:
            os.close(descriptor)

    def sweep(self) -> None:
        """Remove what has ended and is older than it is kept; called over and over."""
        now = time.time()
        if now - self._swept < min(_SWEEP_SECONDS, self._seconds):
            return
        self._swept = now
        newest: dict[str, float] = {}
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                newest[path.stem] = max(newest.get(path.stem, 0.0), path.stat().st_mtime)
        for token in (token for token, changed in newest.items() if now - changed > self._seconds):
            with contextlib.suppress(OSError):
                self._remove(token)

    def _remove(self, token: str) -> None:
        """All of a job that doesn't run; or a file that a process which died had begun."""
        lock, held = self._take(token) if _ID.fullmatch(token) else (-1, True)
        try:
            for path in self._folder.iterdir() if held else ():
                if path.stem == token:
                    path.unlink(missing_ok=True)
        finally:
            if lock >= 0:
                os.close(lock)


class Running:
    """A job that this process computes."""

    def __init__(self, folder: Path, token: str, lock: int, *, who: str, asked: str) -> None:
        self.id = token
        self._folder, self._lock = folder, lock
        self._told = 0.0
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._document: dict[str, Any] = {
            "who": who, "asked": asked, "state": "running", "progress": 0.0, "created": created, "error": None,
        }  # fmt: skip
        (folder / f"{token}.answer").unlink(missing_ok=True)
        self._write()

    def tell(self, fraction: float) -> None:
        """How far it is, 0 to 1; written down twice a second at most."""
        now = time.monotonic()
        if now - self._told < _TELL_SECONDS:
            return
        self._told = now
        self._document["progress"] = round(min(max(fraction, 0.0), 1.0), 4)
        with contextlib.suppress(OSError):  # a full disk costs the news, not the answer
            self._write()

    def done(self, answer: Kept) -> None:
        """Keep the answer; a disk that can't becomes the job's error."""
        head = {"status": answer.status, "headers": dict(answer.headers)}
        try:
            with appearing(self._folder / f"{self.id}.answer") as partial:
                partial.write_bytes(json.dumps(head).encode() + b"\n" + answer.body)
        except OSError:
            self.failed(RefusedError(503, "no-space", "there was no room for the answer; send the image again"))
            return
        self._end(state="done", progress=1.0)
        self._let_go()

    def failed(self, error: RefusedError) -> None:
        """Keep why there is no answer."""
        self._end(state="failed", error={"status": error.status, "reason": error.reason, "message": error.message})
        self._let_go()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.id}.json"

    def _end(self, **changes: Any) -> None:
        self._document |= changes
        with contextlib.suppress(OSError):  # then it is taken for lost, and sent again
            self._write()

    def _write(self) -> None:
        with appearing(self._path) as partial:
            partial.write_text(json.dumps(self._document), encoding="utf-8")
        if (self._folder / f"{self.id}.gone").exists():  # looked at last: whichever comes first, it is removed
            for suffix in ("json", "answer"):
                (self._folder / f"{self.id}.{suffix}").unlink(missing_ok=True)

    def drop(self) -> None:
        """Have it never been: it could not be begun."""
        self._path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _no_such() -> RefusedError:
    return RefusedError(404, "no-such-job", "no job of this id was begun with this key, or its time is over")
