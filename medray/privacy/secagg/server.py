"""The server's part in a round of secure aggregation: it passes on what it can't read, and takes away what remains.

Whatever a site sends is a stranger's: a bad answer counts as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import FederationError
from medray.privacy.secagg.crypto import agree, public_of, stream
from medray.privacy.secagg.roster import PublicKeys, hexes, session_of, threshold_of
from medray.privacy.secagg.shamir import PRIME, combine
from medray.privacy.secagg.site import SHARE_BYTES, pair_purpose

__all__ = ["SecureServer"]

Codes = npt.NDArray[np.unsignedinteger[Any]]
MOST_ENVELOPE = 1024


class SecureServer:
    """One round.

    Args:
        topic: run and round, as the sites have it.
        roster: public keys of the sites that trained.
        quorum: of the run.
    """

    def __init__(self, topic: str, roster: Mapping[str, PublicKeys], quorum: int) -> None:
        self.topic, self.roster = topic, dict(roster)
        self.session = session_of(topic, roster)
        self.threshold = threshold_of(len(roster), quorum)

    def told(self) -> dict[str, Any]:
        """The roster, for the sites."""
        return {name: keys.plain() for name, keys in self.roster.items()}

    def envelopes(self, sender: str, answer: object) -> dict[str, str]:
        """What a site sent for the others, by receiver.

        Raises:
            FederationError: not one for each of them.
        """
        found = hexes(answer)
        if found.keys() != self.roster.keys() - {sender} or any(len(text) > MOST_ENVELOPE for text in found.values()):
            raise FederationError("its shares are not one for each other site")
        return {receiver: text.hex() for receiver, text in found.items()}

    def shares(self, answer: Mapping[str, Any], shared: set[str], survivors: set[str]) -> dict[str, dict[str, int]]:
        """What a site gave to unmask with: ``seeds`` of those who handed in, ``keys`` of those who didn't.

        Raises:
            FederationError: other shares than it was asked for, or none.
        """
        wanted = {"seeds": survivors, "keys": shared - survivors}
        found: dict[str, dict[str, int]] = {}
        for what, whose in wanted.items():
            texts = hexes(answer.get(what))
            numbers = {site: int.from_bytes(text, "big") for site, text in texts.items() if len(text) == SHARE_BYTES}
            if not texts.keys() <= whose or len(numbers) != len(texts) or any(n >= PRIME for n in numbers.values()):
                raise FederationError(f"its shares to unmask with are none ({what})")
            found[what] = numbers
        return found

    def open(
        self, masked: Mapping[str, Codes], shared: set[str], given: Mapping[str, Mapping[str, Mapping[str, int]]]
    ) -> Codes:
        """The sum of the codes of those who handed in.

        Args:
            masked: by site.
            shared: who shared secrets, those of ``masked`` among them.
            given: by site, as :meth:`shares` read it.

        Raises:
            FederationError: too few shares of a secret, or false ones.
        """
        first = next(iter(masked.values()))
        total = np.zeros(first.size, first.dtype)
        for site in sorted(masked):
            seed = self._secret(site, "seeds", given)
            total += masked[site] - stream(seed, total.size, total.dtype)
        for gone in sorted(shared - masked.keys()):
            key = self._secret(gone, "keys", given)
            if public_of(key) != self.roster[gone].mask:
                raise FederationError(f"the shares of {gone}'s masking key give another key: one of them is false")
            for site in sorted(masked):
                purpose = pair_purpose("mask", self.session, self.roster, gone, site)
                pair = agree(key, self.roster[site].mask, purpose=purpose)
                mask = stream(pair, total.size, total.dtype)
                # What `site` did with it is undone: the lower name adds.
                total = total - mask if site < gone else total + mask
        return total

    def _secret(self, whose: str, what: str, given: Mapping[str, Mapping[str, Mapping[str, int]]]) -> bytes:
        points = {site: number for number, site in enumerate(sorted(self.roster), start=1)}
        found = {points[site]: parts[what][whose] for site, parts in given.items() if whose in parts[what]}
        if len(found) < self.threshold:
            raise FederationError(
                f"{len(found)} shares of a secret of {whose}, of the {self.threshold} that it takes to open the sum"
            )
        return combine(found)
