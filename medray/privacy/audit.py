"""Audit: what a site was asked, what it decided, and what it released; a chain that its owner can verify and read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from medray.errors import PrivacyError
from medray.privacy.chain import Chain

Event = Literal["started", "asked", "refused", "released", "failed", "noted"]


@dataclass(frozen=True, kw_only=True)
class AuditLine:
    """One line.

    Attributes:
        when: UTC, as the site's clock had it.
        event: what happened.
        about: who asked what: kind, round, recipe, reason, bytes, hash of what left.
    """

    when: str
    event: str
    about: Mapping[str, Any]


class Audit:
    """The audit log at ``path``; begun by the first line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._chain = Chain(path, "an audit log")

    def write(self, event: Event, **about: str | int | float | None) -> None:
        """Add a line; it lies on the disk when this returns.

        Raises:
            PrivacyError: it can't be written, or the log is broken: then nothing may be answered.
        """
        try:
            with self._chain.locked() as lines:
                self._chain.append(lines, {"event": event, **about})
        except FileNotFoundError:
            try:
                self._chain.create()
            except OSError as error:
                raise PrivacyError(
                    f"{self._chain.path}: can't be written ({error.strerror}). Choose a folder of this site's"
                ) from None
            self.write(event, **about)

    def read(self) -> tuple[AuditLine, ...]:
        """All lines, once the chain has been verified.

        Raises:
            PrivacyError: there is no log, or a line was altered, which is named.
        """
        records = [dict(record) for record in self._chain.read().records]
        found = []
        for record in records:
            when, event = str(record.pop("time")), str(record.pop("event"))
            about = {name: value for name, value in record.items() if name not in ("n", "previous")}
            found.append(AuditLine(when=when, event=event, about=about))
        return tuple(found)
