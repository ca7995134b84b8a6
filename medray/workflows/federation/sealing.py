"""A site's updates under secure aggregation: checked here, since nobody else can, and kept here until they are masked.

``secret.pt`` has the keys of the newest round and what was answered with them, ``unsent.pt`` its update, until
``masked.pt`` has that masked. All are on the disk before an answer leaves: a site that was killed answers as it did
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from medray.config.schema import Experiment
from medray.engines.flower.parcel import Parcel
from medray.errors import FederationError
from medray.learn.aggregation.checks import norm, too_long, usual_norm
from medray.learn.aggregation.fixed import HEAVIEST, Codes, fixed_point, flat
from medray.learn.aggregation.mean import Weights
from medray.privacy.central import clipped
from medray.privacy.policy import recipe_digest
from medray.privacy.secagg.identity import Signer
from medray.privacy.secagg.site import STAGES, SecureSite, Stage
from medray.train import checkpoint

__all__ = ["STAGES", "Sealing", "alike", "topic_of"]

SECRET, UNSENT, MASKED = "secret.pt", "unsent.pt", "masked.pt"
REMEMBERED = 5
"""Rounds whose norms say what is usual here."""


def alike(experiment: Experiment) -> bool:
    """Whether all sites count for one: under privacy, where a site's number of cases could be anything."""
    return experiment.privacy.on or experiment.federation.privacy.on


def topic_of(experiment: Experiment, number: int) -> str:
    """What keys of a round are for: the run's recipe and the round, from 0."""
    return f"{recipe_digest(experiment)}/{number}"


class Sealing:
    """Of one site.

    Args:
        directory: of the site.
        name: of the site.
        signer: gives the site's node key, when it is first needed; None in a simulation.
    """

    def __init__(self, directory: Path, name: str, signer: Callable[[], Signer] | None = None) -> None:
        self.directory, self.name, self._signer_of = directory, name, signer
        self._signer: Signer | None = None

    def begin(
        self, experiment: Experiment, number: int, update: Weights, cases: int, *, clip: float | None = None
    ) -> dict[str, str]:
        """Keep a round's update, and give the public keys of the round.

        Args:
            experiment: of the run.
            number: of the round, from 0.
            update: what this site would add to the weights.
            cases: that trained.
            clip: the norm that the update may have, where the server adds noise to the sum.

        Raises:
            FederationError: the update isn't fit to be summed.
        """
        before = self._secret()
        same = before is not None and before["recipe"] == recipe_digest(experiment)
        norms = list(before["norms"]) if before is not None and same else []
        length = self._checked(update, norms, experiment)
        site = SecureSite.begin(topic=topic_of(experiment, number), name=self.name, quorum=experiment.federation.quorum)
        weight = 1 if alike(experiment) else max(1, min(cases, HEAVIEST))
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in update.items()}
        unsent = {"topic": site.topic, "weight": weight, "clip": clip, "update": tensors}
        checkpoint.save(self.directory / UNSENT, unsent)
        recipe, norms = recipe_digest(experiment), [*norms, length][-REMEMBERED:]
        checkpoint.save(self.directory / SECRET, {"recipe": recipe, "norms": norms, "site": site.plain()})
        return site.keys(self._sign()).plain()

    def answer(self, experiment: Experiment, parcel: Parcel) -> Parcel:
        """Answer a stage of secure aggregation.

        Raises:
            FederationError: this site sits the round out; the message says why.
        """
        stage, number = cast(Stage, parcel.text["ask"]), int(parcel.text["round"])
        secret = self._secret()
        topic = topic_of(experiment, number)
        if secret is None or secret["site"]["topic"] != topic:
            raise FederationError(f"site {self.name}: has no keys of round {number + 1} of this run")
        site = SecureSite(**secret["site"])
        said = {key: value for key, value in parcel.text.items() if key not in ("ask", "experiment", "round")}
        text, masked = site.answer(
            stage, said, signer=self._sign(), codes=lambda sites: self._codes(experiment, topic, sites)
        )
        if masked is not None:
            words = masked.view(masked.dtype.str.replace("u", "i"))
            checkpoint.save(self.directory / MASKED, {"topic": topic, "masked": torch.from_numpy(words)})
        checkpoint.save(self.directory / SECRET, {**secret, "site": site.plain()})
        if stage != "masked":
            return Parcel(text=text)
        (self.directory / UNSENT).unlink(missing_ok=True)
        return Parcel(text=text, arrays={"masked": self._masked(topic)})

    def _masked(self, topic: str) -> Codes:
        kept: Mapping[str, Any] = checkpoint.load(self.directory / MASKED) or {}
        if kept.get("topic") != topic:
            raise FederationError(f"site {self.name}: its masked update of this round is gone")
        words: Codes = kept["masked"].numpy()
        return words.view(words.dtype.str.replace("i", "u"))

    def _checked(self, update: Weights, norms: list[float], experiment: Experiment) -> float:
        """The update's norm, if it is fit: under a mask no server can look."""
        length = norm(update)
        if not math.isfinite(length):
            raise FederationError(f"site {self.name}: its update holds NaN or infinite values, and is kept back")
        federation = experiment.federation
        if federation.privacy.on:  # it is clipped to what all may have
            return length
        reason = too_long(length, usual_norm(norms), outlier=federation.outlier, most=federation.max_norm)
        if reason is not None:
            raise FederationError(f"site {self.name}: keeps its update back: {reason}")
        return length

    def _codes(self, experiment: Experiment, topic: str, sites: int) -> Codes:
        kept: Mapping[str, Any] = checkpoint.load(self.directory / UNSENT) or {}
        if kept.get("topic") != topic:
            raise FederationError(f"site {self.name}: its update of this round is gone")
        point = fixed_point(sites=sites, alike=alike(experiment))
        row = flat({name: value.numpy() for name, value in kept["update"].items()})
        if experiment.federation.privacy.on:
            row = _bounded(row, kept["clip"], point.step)
        return point.encode(row, int(kept["weight"]))

    def _secret(self) -> dict[str, Any] | None:
        return checkpoint.load(self.directory / SECRET)

    def _sign(self) -> Signer | None:
        if self._signer is None and self._signer_of is not None:
            self._signer = self._signer_of()
        return self._signer


def _bounded(row: npt.NDArray[np.float64], clip: object, step: float) -> npt.NDArray[np.float64]:
    """The update clipped so that its codes, too, have no greater norm, and 1/2 or -1/2: whether it was shorter before.

    Raises:
        FederationError: the server named no norm, or one below what rounding adds.
    """
    slack = step / 2 * math.sqrt(row.size)
    if not isinstance(clip, int | float) or not slack < clip < math.inf:
        raise FederationError(f"the norm that updates are to be clipped to is {clip!r}, and must be above {slack:.1g}")
    inside = float(np.linalg.norm(row)) <= clip
    return np.append(clipped(row, clip - slack)[0], 0.5 if inside else -0.5)
