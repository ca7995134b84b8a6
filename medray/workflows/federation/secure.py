"""The server's way through a round of secure aggregation: stage by stage, with those who are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from medray.config.schema import Experiment
from medray.engines.flower.parcel import Hub, Parcel, wire_size
from medray.errors import FederationError
from medray.learn.aggregation.fixed import Codes, fixed_point
from medray.privacy.secagg.identity import check_signature
from medray.privacy.secagg.roster import FEWEST, PublicKeys, hexes, keys_text, read_roster
from medray.privacy.secagg.server import SecureServer
from medray.privacy.secagg.site import Stage
from medray.workflows.federation.sealing import alike, topic_of

__all__ = ["Opened", "open_round", "read_keys"]

T = TypeVar("T")

SMALL_SECONDS = 300.0
"""What a stage may take in which nothing large is sent: nobody trains in it."""


@dataclass(kw_only=True)
class Opened:
    """What came of a round.

    Attributes:
        mean: of those who handed in, (D,) as :func:`medray.learn.aggregation.fixed.flat` has it; None where the sum
            can't be had.
        inside: under noise at the server the mean over sites of 1/2, or -1/2 where the update had to be clipped.
        sites: who handed in.
        weights: what they count for together.
        reason: why there is none.
        lost: by site, how and why it didn't come along: (late or failed, reason).
        down, up: bytes by site.
    """

    mean: npt.NDArray[np.float64] | None = None
    inside: float = 0.0
    sites: int = 0
    weights: int = 0
    reason: str | None = None
    lost: dict[str, tuple[str, str]] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)


def read_keys(
    answer: Parcel, name: str, topic: str, others: Mapping[str, PublicKeys], authority: bytes | None
) -> PublicKeys:
    """A site's public keys of a round, as its answer holds them.

    Args:
        answer: of the site.
        name: of the site.
        topic: of the round.
        others: keys that other sites gave.
        authority: certificate (PEM) to check signatures by; None in a simulation.

    Raises:
        FederationError: it holds arrays, no keys, another's, or ones that this site didn't sign.
    """
    if answer.arrays:
        raise FederationError("it sent arrays, and was asked for public keys alone")
    keys = PublicKeys.read(answer.text.get("keys"))
    read_roster({other: found.plain() for other, found in {**others, name: keys}.items()})
    if authority is not None:  # else the other sites would find out, and give the round up
        text = keys_text(topic, name, keys.envelope, keys.mask)
        check_signature(authority, name, keys.certificate, keys.signature, text)
    return keys


def open_round(hub: Hub, experiment: Experiment, asked: Parcel, keys: Mapping[str, PublicKeys]) -> Opened:
    """Ask the sites that trained for the sum of their updates.

    Args:
        hub: the way to them.
        experiment: of the run.
        asked: what they trained by: run, round and shared weights.
        keys: public keys by site, as they came with the end of its training.
    """
    opened, federation = Opened(), experiment.federation
    least = max(FEWEST, federation.quorum)
    if len(keys) < least:
        opened.reason = f"{len(keys)} sites trained, fewer than the {least} among whom an update is hidden"
        return opened
    try:
        server, until = SecureServer(topic_of(experiment, asked), keys, least), monotonic() + federation.deadline
        _Way(hub, experiment, asked, server, opened, until).go()
    except FederationError as error:
        opened.reason = str(error)
    return opened


@dataclass
class _Way:
    """Through one round; what comes of it, and who is lost, goes into ``opened``.

    All stages together have ``federation.deadline``, and end at ``until``. It isn't the training's: a site that trains
    until then would leave no time for the others' sum.
    """

    hub: Hub
    experiment: Experiment
    asked: Parcel
    server: SecureServer
    opened: Opened
    until: float

    def go(self) -> None:
        """All stages; fills :attr:`opened`."""
        server, everyone = self.server, set(self.server.roster)
        told = {"roster": server.told()}
        sealed = self._collect(
            "shares",
            dict.fromkeys(everyone, told),
            lambda name, answer: server.envelopes(name, answer.text.get("envelopes")),
        )
        shared = set(sealed)
        most = self.experiment.federation.max_cases
        point = fixed_point(sites=len(everyone), alike=alike(self.experiment), heaviest=most)
        entries = sum(value.size for value in self.asked.arrays.values())
        size = entries + 1 + self.experiment.federation.privacy.on
        masked = self._collect(
            "masked",
            {name: {"envelopes": {sender: sealed[sender][name] for sender in shared - {name}}} for name in shared},
            lambda _, answer: _codes(answer, size, point.dtype),
        )
        survivors = set(masked)
        who: dict[str, Any] = {"survivors": sorted(survivors)}
        signatures = self._collect(
            "confirm",
            dict.fromkeys(survivors, who),
            lambda _, answer: hexes({"of": answer.text.get("signature")})["of"].hex(),
        )
        signed: dict[str, Any] = {"signatures": signatures}
        given = self._collect(
            "unmask",
            dict.fromkeys(signatures, signed),
            lambda _, answer: server.shares(answer.text, shared, survivors),
        )
        found = point.decode(server.open(masked, shared, given), sites=len(masked))
        if found is None:
            raise FederationError("what should be the sum is noise: a site masked otherwise than it should")
        # Who handed in is in the sum, also if it was gone when it came to unmasking.
        for name in survivors:
            self.opened.lost.pop(name, None)
        self.opened.mean, self.opened.weights, self.opened.sites = found[0][:entries], found[1], len(masked)
        self.opened.inside = float(found[0][entries:].sum())

    def _collect(
        self, stage: Stage, texts: Mapping[str, Mapping[str, Any]], read: Callable[[str, Parcel], T]
    ) -> dict[str, T]:
        """What the sites' answers to a stage hold; who gives none is noted.

        Raises:
            FederationError: too few are left to open a sum.
        """
        found: dict[str, T] = {}
        for name, answer in self._ask(stage, texts).items():
            try:
                found[name] = read(name, answer)
            except FederationError as error:  # a stranger's words
                self.opened.lost[name] = ("failed", str(error))
        if len(found) < self.server.threshold:
            gone = "; ".join(f"{name}: {why}" for name, (_, why) in sorted(self.opened.lost.items()))
            raise FederationError(
                f"{len(found)} of {len(self.server.roster)} sites answered to {stage}, and it takes "
                f"{self.server.threshold} to open the sum. {gone}"
            )
        return found

    def _ask(self, stage: Stage, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Parcel]:
        """The answers to a stage that are none of an error."""
        about = {"ask": stage, **{key: self.asked.text[key] for key in ("experiment", "run", "round")}}
        present = set(self.hub.sites())
        # What all are told alike is written once.
        written = {id(text): Parcel(text={**about, **text}) for text in texts.values()}
        parcels = {name: written[id(text)] for name, text in sorted(texts.items()) if name in present}
        deadline = self.experiment.federation.deadline
        left = self.until - monotonic()
        if left <= 0:
            raise FederationError(f"no time is left for {stage}: its stages took {deadline:g} s (federation.deadline)")
        wait = left if stage == "masked" else min(left, SMALL_SECONDS)
        answers = self.hub.ask("query", parcels, wait)
        found: dict[str, Parcel] = {}
        for name in sorted(texts):
            answer = answers.get(name)
            if name in parcels:
                self.opened.down[name] = self.opened.down.get(name, 0) + wire_size(parcels[name])
            if answer is None:
                why = f"no answer to {stage} within {wait:.3g} s" if name in present else f"gone before {stage}"
                self.opened.lost[name] = ("late", f"trained, then {why}")
                continue
            self.opened.up[name] = self.opened.up.get(name, 0) + answer.size
            if answer.error is not None:
                self.opened.lost[name] = ("failed", answer.error)
            else:
                found[name] = answer
        return found


def _codes(parcel: Parcel, size: int, dtype: np.dtype[Any]) -> Codes:
    codes = parcel.arrays.get("masked")
    if codes is None or set(parcel.arrays) != {"masked"} or codes.dtype != dtype or codes.shape != (size,):
        raise FederationError(f"its masked update isn't {size} words of {dtype}")
    return cast(Codes, codes)
