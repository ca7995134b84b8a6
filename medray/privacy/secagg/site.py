"""A site's part in a round of secure aggregation. What it answers, it answers once; see the package's head.

The site trusts nobody but itself and what is signed: it computes the threshold by itself, it answers each stage to one
question alone (to the same one, with the same answer), and it has forgotten its secrets before its last answer leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from medray.errors import FederationError
from medray.privacy.secagg.crypto import agree, new_secret, open_envelope, public_of, seal, stream
from medray.privacy.secagg.identity import Signer
from medray.privacy.secagg.roster import (
    FEWEST,
    PublicKeys,
    hexes,
    keys_text,
    names_of,
    read_roster,
    session_of,
    survivors_text,
    threshold_of,
)
from medray.privacy.secagg.shamir import split

__all__ = ["SHARE_BYTES", "STAGES", "SecureSite", "Stage", "envelope_about", "pair_purpose"]

Stage = Literal["shares", "masked", "confirm", "unmask"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SHARE_BYTES = 33
"""Of a number below the prime."""

Codes = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(kw_only=True)
class SecureSite:
    """One site in one round. All of it is text and numbers, which :meth:`plain` gives for a file.

    Attributes:
        topic: run and round.
        name: of the site.
        quorum: of the run: the least threshold.
        envelope_key, mask_key: private, hexadecimal; empty once they are forgotten.
        seed: of the site's own mask, likewise.
        answered: by stage, the question's digest and the answer.
        roster: public keys of all sites of the round, as the server told them.
        own: this site's shares of its own seed and masking key.
        envelopes: shares of others, by sender, encrypted.
        survivors: who handed in.
    """

    topic: str
    name: str
    quorum: int
    envelope_key: str = ""
    mask_key: str = ""
    seed: str = ""
    answered: dict[str, dict[str, Any]] = field(default_factory=dict)
    roster: dict[str, dict[str, str]] = field(default_factory=dict)
    own: str = ""
    envelopes: dict[str, str] = field(default_factory=dict)
    survivors: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, *, topic: str, name: str, quorum: int) -> SecureSite:
        """With new secrets."""
        first, second, third = (new_secret().hex() for _ in range(3))
        return cls(topic=topic, name=name, quorum=quorum, envelope_key=first, mask_key=second, seed=third)

    def plain(self) -> dict[str, Any]:
        """For a file; ``SecureSite(**plain)`` undoes it."""
        return asdict(self)

    def keys(self, signer: Signer | None) -> PublicKeys:
        """The public keys of this round, signed where there is a signer."""
        envelope, mask = (public_of(bytes.fromhex(key)) for key in (self.envelope_key, self.mask_key))
        if signer is None:
            return PublicKeys(envelope=envelope, mask=mask)
        signature = signer.sign(keys_text(self.topic, self.name, envelope, mask))
        return PublicKeys(envelope=envelope, mask=mask, certificate=signer.certificate, signature=signature)

    def answer(
        self, stage: Stage, said: Mapping[str, Any], *, signer: Signer | None, codes: Callable[[int], Codes]
    ) -> tuple[dict[str, Any], Codes | None]:
        """Answer a stage. The caller writes :meth:`plain` to the disk before the answer leaves.

        Args:
            stage: in order.
            said: the server's words.
            signer: for signatures; without one none is asked for: a simulation.
            codes: the update as whole numbers, for a round of so many sites.

        Returns:
            text, and the masked update of stage ``masked``, the first time: the caller keeps it.

        Raises:
            FederationError: out of order, another question than before, or one that would give the update away.
        """
        question = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        before = self.answered.get(stage)
        if before is not None and before["question"] != question:
            raise FederationError(
                f"site {self.name}: was asked for {stage} of this round before, in other words. A second answer could "
                "give its update away: it sits this round out"
            )
        if before is not None:
            return dict(before["answer"]), None
        if len(self.answered) != STAGES.index(stage):
            raise FederationError(f"site {self.name}: is asked for {stage} of this round out of turn")
        text: dict[str, Any] = {}
        masked: Codes | None = None
        if stage == "shares":
            text = {"envelopes": self._share(said, signer)}
        elif stage == "masked":
            masked = self._mask(said, codes)
        elif stage == "confirm":
            text = {"signature": self._confirm(said, signer).hex()}
        else:
            text = self._unmask(said, signer)
        self.answered[stage] = {"question": question, "answer": text}
        return text, masked

    # -- the stages

    def _share(self, said: Mapping[str, Any], signer: Signer | None) -> dict[str, str]:
        roster = read_roster(said.get("roster"))
        own = self.keys(None)
        mine = roster.get(self.name)
        if mine is None or (mine.envelope, mine.mask) != (own.envelope, own.mask):
            raise FederationError(f"site {self.name}: its own keys are not among those that it is shown")
        least = max(FEWEST, self.quorum)
        if len(roster) < least:
            raise FederationError(
                f"site {self.name}: {len(roster)} sites are fewer than {least}: too few to hide an update among"
            )
        if signer is not None:
            for site, keys in roster.items():
                text = keys_text(self.topic, site, keys.envelope, keys.mask)
                signer.check(site, keys.certificate, keys.signature, text)
        points = _points(roster)
        threshold, session = threshold_of(len(roster), self.quorum), session_of(self.topic, roster)
        parts = [
            split(bytes.fromhex(secret), list(points.values()), threshold) for secret in (self.seed, self.mask_key)
        ]
        sealed: dict[str, str] = {}
        for site, point in points.items():
            both = b"".join(part[point].to_bytes(SHARE_BYTES, "big") for part in parts)
            if site == self.name:
                self.own = both.hex()
                continue
            purpose = pair_purpose("envelope", session, roster, self.name, site)
            key = agree(bytes.fromhex(self.envelope_key), roster[site].envelope, purpose=purpose)
            sealed[site] = seal(key, both, envelope_about(session, self.name, site)).hex()
        self.roster = {site: keys.plain() for site, keys in roster.items()}
        return sealed

    def _mask(self, said: Mapping[str, Any], codes: Callable[[int], Codes]) -> Codes:
        roster = read_roster(self.roster)
        envelopes = hexes(said.get("envelopes"))
        if not envelopes.keys() <= roster.keys() - {self.name}:
            raise FederationError(f"site {self.name}: is shown shares of sites that are none of this round")
        self._enough(len(envelopes) + 1, roster, "shared their secrets")
        session = session_of(self.topic, roster)
        masked = codes(len(roster)).copy()
        masked += stream(bytes.fromhex(self.seed), masked.size, masked.dtype)
        for site in sorted(envelopes):
            purpose = pair_purpose("mask", session, roster, self.name, site)
            key = agree(bytes.fromhex(self.mask_key), roster[site].mask, purpose=purpose)
            pair = stream(key, masked.size, masked.dtype)
            masked = masked + pair if self.name < site else masked - pair
        self.envelopes = {site: sealed.hex() for site, sealed in envelopes.items()}
        return masked

    def _confirm(self, said: Mapping[str, Any], signer: Signer | None) -> bytes:
        roster = read_roster(self.roster)
        survivors = names_of(said.get("survivors"))
        if self.name not in survivors or not set(survivors) <= {self.name, *self.envelopes}:
            raise FederationError(f"site {self.name}: those who are said to have handed in aren't those who could")
        self._enough(len(survivors), roster, "handed in")
        self.survivors = list(survivors)
        return b"" if signer is None else signer.sign(self._survivors_text(roster))

    def _unmask(self, said: Mapping[str, Any], signer: Signer | None) -> dict[str, Any]:
        roster = read_roster(self.roster)
        signatures = hexes(said.get("signatures"))
        if not signatures.keys() <= set(self.survivors):
            raise FederationError(f"site {self.name}: is shown signatures of sites that didn't hand in")
        self._enough(len(signatures), roster, "confirmed who handed in")
        if signer is not None:
            text = self._survivors_text(roster)
            for site, signature in signatures.items():
                signer.check(site, roster[site].certificate, signature, text)
        session = session_of(self.topic, roster)
        seeds, keys = {}, {}
        for site in sorted({self.name, *self.envelopes}):
            both = self._opened(session, site, roster)
            if both is None:  # its sender's fault; others' shares may do
                continue
            if site in self.survivors:
                seeds[site] = both[:SHARE_BYTES].hex()
            else:
                keys[site] = both[SHARE_BYTES:].hex()
        self.envelope_key = self.mask_key = self.seed = self.own = ""
        self.envelopes = {}
        return {"seeds": seeds, "keys": keys}

    # -- what they share

    def _survivors_text(self, roster: Mapping[str, PublicKeys]) -> bytes:
        return survivors_text(session_of(self.topic, roster), {self.name, *self.envelopes}, self.survivors)

    def _opened(self, session: bytes, site: str, roster: Mapping[str, PublicKeys]) -> bytes | None:
        """The two shares that this site holds of another's secrets."""
        if site == self.name:
            return bytes.fromhex(self.own)
        purpose = pair_purpose("envelope", session, roster, self.name, site)
        key = agree(bytes.fromhex(self.envelope_key), roster[site].envelope, purpose=purpose)
        both = open_envelope(key, bytes.fromhex(self.envelopes[site]), envelope_about(session, site, self.name))
        return both if both is not None and len(both) == 2 * SHARE_BYTES else None

    def _enough(self, count: int, roster: Mapping[str, PublicKeys], did: str) -> None:
        threshold = threshold_of(len(roster), self.quorum)
        if count < threshold:
            raise FederationError(
                f"site {self.name}: {count} of {len(roster)} sites {did}, fewer than {threshold}: it goes no further"
            )


def envelope_about(session: bytes, sender: str, receiver: str) -> bytes:
    """What binds an envelope to its round, sender and receiver."""
    return json.dumps([session.hex(), sender, receiver]).encode()


def pair_purpose(
    what: Literal["envelope", "mask"], session: bytes, roster: Mapping[str, PublicKeys], one: str, other: str
) -> bytes:
    """What the key that two sites agree on is for: their names and public keys are in it, alike on both sides.

    X25519 takes several public keys for one (its top bit is ignored, and a point of low order may be added). Without
    the names a site that signed such a twin of another's key would have a third use one stream with both, once added
    and once taken away.
    """
    pair = [[name, getattr(roster[name], what).hex()] for name in sorted((one, other))]
    return json.dumps(["medray secure aggregation 1", what, session.hex(), pair]).encode()


def _points(roster: Mapping[str, PublicKeys]) -> dict[str, int]:
    """Where each site's shares are read."""
    return {site: number for number, site in enumerate(sorted(roster), start=1)}
