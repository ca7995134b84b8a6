"""What the sites of a round tell each other in the clear: public keys, who is in, who handed in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from medray.config.federation import FEWEST_UNSEEN as FEWEST
from medray.errors import FederationError
from medray.privacy.secagg.crypto import KEY_BYTES

__all__ = [
    "FEWEST",
    "PublicKeys",
    "hexes",
    "keys_text",
    "names_of",
    "read_roster",
    "session_of",
    "survivors_text",
    "threshold_of",
]

MOST_CERTIFICATE = 8192


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """A site's public keys of one round.

    Attributes:
        envelope, mask: X25519, 32 bytes each.
        certificate: of the site's node key, PEM; empty in a simulation, where nobody can be impersonated.
        signature: of :func:`keys_text` by that key; empty likewise.
    """

    envelope: bytes
    mask: bytes
    certificate: bytes = b""
    signature: bytes = b""

    def plain(self) -> dict[str, str]:
        """For a message."""
        return {name: value.hex() for name, value in vars(self).items()}

    @classmethod
    def read(cls, value: object) -> PublicKeys:
        """:meth:`plain` undone.

        Raises:
            FederationError: a stranger wrote something else.
        """
        found = hexes(value)
        if found.keys() != {"envelope", "mask", "certificate", "signature"}:
            raise FederationError("what should be public keys of secure aggregation is something else")
        keys = cls(**found)
        if len(keys.envelope) != KEY_BYTES or len(keys.mask) != KEY_BYTES or keys.envelope == keys.mask:
            raise FederationError("public keys of secure aggregation have 32 bytes each, and are two")
        if max(len(keys.certificate), len(keys.signature)) > MOST_CERTIFICATE:
            raise FederationError(f"a certificate of more than {MOST_CERTIFICATE} bytes is none")
        return keys


def read_roster(value: object) -> dict[str, PublicKeys]:
    """Public keys by site, no key twice.

    Raises:
        FederationError: it is no such thing.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise FederationError("what should be the sites' public keys is something else")
    roster = {name: PublicKeys.read(keys) for name, keys in sorted(value.items())}
    every = [key for keys in roster.values() for key in (keys.envelope, keys.mask)]
    if len(set(every)) != len(every):
        raise FederationError("two public keys of secure aggregation are alike: somebody copies another's")
    return roster


def threshold_of(sites: int, quorum: int) -> int:
    """Sites of a round that it takes to open its sum: the quorum, and more than half."""
    return max(quorum, sites // 2 + 1)


def session_of(topic: str, roster: Mapping[str, PublicKeys]) -> bytes:
    """What names this round of this run among these sites with these keys, and nothing else; 32 bytes."""
    keys = {name: [found.envelope.hex(), found.mask.hex()] for name, found in roster.items()}
    return hashlib.sha256(_canonical(["medray secure aggregation 1", topic, keys])).digest()


def keys_text(topic: str, site: str, envelope: bytes, mask: bytes) -> bytes:
    """What a site signs of its keys."""
    return _canonical(["medray secure aggregation 1: keys", topic, site, envelope.hex(), mask.hex()])


def survivors_text(session: bytes, shared: Iterable[str], survivors: Iterable[str]) -> bytes:
    """What a site signs of who shared their secrets, and who of them handed in."""
    words = ["medray secure aggregation 1: survivors", session.hex(), sorted(shared), sorted(survivors)]
    return _canonical(words)


def hexes(value: object) -> dict[str, bytes]:
    """Bytes by name, from hexadecimal text of a stranger.

    Raises:
        FederationError: it is no such thing.
    """
    try:
        if not isinstance(value, Mapping):
            raise TypeError
        return {str(name): bytes.fromhex(text) for name, text in value.items()}
    except (TypeError, ValueError):
        raise FederationError("what should be bytes by name is something else") from None


def names_of(value: object) -> tuple[str, ...]:
    """Names, in order, each once.

    Raises:
        FederationError: it is no such thing.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise FederationError("what should be names of sites is something else")
    return tuple(sorted(set(value)))


def _canonical(words: list[Any]) -> bytes:
    return json.dumps(words, sort_keys=True).encode()
