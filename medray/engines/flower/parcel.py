"""Parcel and Hub: what a server and sites say to each other, without a word of Flower."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Answer", "Hub", "HubOf", "Kind", "Parcel", "readable", "wire_size"]

Kind = Literal["query", "train", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One message.

    Attributes:
        text: plain JSON.
        arrays: by name.
        error: why there is no answer; None where there is one.
        size: bytes that it took on the wire (arrays and text); 0 for one that has not travelled yet.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    error: str | None = None
    size: int = 0


def wire_size(parcel: Parcel) -> int:
    """Bytes that a parcel's arrays and text take, without what a network adds."""
    return len(json.dumps(dict(parcel.text))) + sum(value.nbytes for value in parcel.arrays.values())


def readable(text: str, most: int) -> str:
    """What a stranger wrote, fit for a log: so many characters at most, in one line, none that steers a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:most])


Answer = Callable[[Kind, Parcel], Parcel]
"""What a site does with a message."""


class Hub(Protocol):
    """The server's way to the sites."""

    def sites(self) -> tuple[str, ...]:
        """Names of the sites that are there now, in order."""

    def ask(self, kind: Kind, parcels: Mapping[str, Parcel], deadline: float) -> dict[str, Parcel]:
        """Send a message to some sites, and wait for their answers.

        Args:
            kind: what for.
            parcels: by site.
            deadline: seconds after which no answer is waited for.

        Returns:
            the answers that came in time, by site; who is missing was late.
        """


HubOf = Callable[[Mapping[int, str]], Hub]
"""A hub to the sites, from their names by their nodes' numbers."""
