"""A request that is refused: its status, and what the client is told."""

from __future__ import annotations

import errno

from medray.errors import ServingError


class RefusedError(ServingError):
    """Nothing of it goes to a log but ``status`` and ``reason``: the message may speak of the client's data.

    Args:
        status: of HTTP.
        reason: a word for programs, such as ``too-large``.
        message: the value, the rule and the fix.
        retry_after: seconds after which the same request may do better.
    """

    def __init__(self, status: int, reason: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after

    @property
    def body(self) -> dict[str, dict[str, str]]:
        """As JSON."""
        return {"error": {"reason": self.reason, "message": self.message}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def is_full(error: BaseException) -> bool:
    """Whether a disk, or a share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space() -> RefusedError:
    """503: the disk is full."""
    return RefusedError(503, "no-space", "the server's disk is full; try again later", retry_after=10)


def key_reused() -> RefusedError:
    """422: an Idempotency-Key that was another request's."""
    return RefusedError(422, "key-reused", "this Idempotency-Key was another request's; take a new one for each")
