"""A site's updates under secure aggregation: checked here, since nobody else can, and kept here until they are masked.

In a run's folder (see ``keeping``) ``secret.pt`` has the keys of its newest round and what was answered with them,
``unsent.pt`` the update, until ``masked.pt`` has that masked. ``asked.pt`` has, of each recipe, the highest round that
was answered and the digest of its question, ``peers.pt`` how new the certificates are that other sites have shown,
``groups.pt`` among whom what may be summed with one group alone was. All are on the disk before an answer leaves: a
site that was killed answers as before.

One question of a round is answered, whatever run asks it: from the sums of two, among other sites, a server would take
one site's update by difference. The question's digest is in what the sites sign of their keys: sites that were sent
other weights take each other's keys for false, and sum nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from medray.config.schema import Experiment
from medray.engines.flower.parcel import Parcel
from medray.errors import FederationError, PrivacyError, WithheldError
from medray.learn.aggregation.checks import beyond, norm, too_long, usual_norm
from medray.learn.aggregation.fixed import Codes, fixed_point, flat
from medray.learn.aggregation.mean import Weights
from medray.privacy.central import clipped
from medray.privacy.credentials import issued_at
from medray.privacy.policy import recipe_digest
from medray.privacy.secagg.identity import Signer
from medray.privacy.secagg.roster import read_roster
from medray.privacy.secagg.site import STAGES, SecureSite, Stage
from medray.train import checkpoint
from medray.workflows.federation.keeping import forget_old, place_of, run_folder

__all__ = ["STAGES", "FirstRound", "KeptBackError", "Sealing", "alike", "question_of", "topic_of"]

ASKED, PEERS, GROUPS = "asked.pt", "peers.pt", "groups.pt"
SECRET, UNSENT, MASKED = "secret.pt", "unsent.pt", "masked.pt"
REMEMBERED = 5
"""Rounds whose norms say what is usual here."""


def alike(experiment: Experiment) -> bool:
    """Whether all sites count for one: under privacy, where a site's number of cases could be anything."""
    return experiment.privacy.on or experiment.federation.privacy.on


def question_of(parcel: Parcel) -> str:
    """SHA-256 of all that a question says: words and weights."""
    digest = hashlib.sha256(json.dumps(dict(parcel.text), sort_keys=True).encode())
    for name, value in sorted(parcel.arrays.items()):
        digest.update(f"{name}\0{value.dtype}\0{value.shape}\0".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def topic_of(experiment: Experiment, parcel: Parcel) -> str:
    """What keys of a round are for: recipe, run, round and the question that sites trained by.

    Raises:
        FederationError: the question names no run, or no round.
    """
    run, number = place_of(parcel)
    return f"{recipe_digest(experiment)}/{run}/{number}/{question_of(parcel)}"


class KeptBackError(WithheldError):
    """An update that isn't fit to be summed; figures of it are what a mask is to hide."""


@dataclass(frozen=True, kw_only=True)
class FirstRound:
    """What a site that has nothing to compare holds its update against.

    Attributes:
        farthest: of :func:`medray.learn.aggregation.reach.reach`.
        statistics: names of weights that no gradient moves, and that it says nothing of.
    """

    farthest: float | None
    statistics: frozenset[str]


class Sealing:
    """Of one site.

    Args:
        directory: of the site.
        name: of the site.
        signer: gives the site's node key, when it is first needed; None in a simulation.
        note: hears what the site's owner should know, and nobody else.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        signer: Callable[[], Signer] | None = None,
        *,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory, self.name, self._signer_of, self._note = directory, name, signer, note
        self._signer: Signer | None = None

    def ready(self) -> None:
        """Make sure, before anything is spent on a round, that its keys can be signed.

        Raises:
            FederationError: what signs isn't there, doesn't fit, or has run out.
        """
        self._signer = None  # a certificate may have been renewed since
        self._sign()

    def permit(self, experiment: Experiment, asked: Parcel) -> None:
        """Refuse a question of a round that was answered to another, or of an earlier one, whatever run asks.

        The same question again is fine as long as nothing was told with its keys.

        Raises:
            PrivacyError: the sum of a second answer, less that of the first, could be this site's update.
            FederationError: the question names no run, or no round.
        """
        run, number = place_of(asked)
        last = self._asked().get(recipe_digest(experiment))
        if last is None or number > last[0]:
            return
        secret = checkpoint.load(self._folder(experiment, run) / SECRET)
        mine = secret is not None and secret["site"]["topic"] == topic_of(experiment, asked)
        if mine and secret is not None and not secret["site"]["answered"]:
            return
        raise PrivacyError(
            f"site {self.name}: round {last[0] + 1} of this recipe was answered before, and is asked for round "
            f"{number + 1} {'again' if mine else 'in other words'}. The sums of both could give its update away. Go on "
            "with the run that asked first (--resume), or begin a new federation, with another seed"
        )

    def begin(
        self,
        experiment: Experiment,
        asked: Parcel,
        update: Weights,
        cases: int,
        *,
        guard: FirstRound | None = None,
        once: str | None = None,
    ) -> dict[str, str]:
        """Keep a round's update, and give the public keys of the round.

        Args:
            experiment: of the run.
            asked: the question that this site trained by: run, round, weights, and, where the server adds noise to the
                sum, ``clip``: the norm that the update may have.
            update: what this site would add to the weights.
            cases: that trained.
            guard: how far the update of a first round may reach.
            once: names what doesn't change from run to run: it is summed among one group of sites, and never again
                with others, whatever recipe or run asks. None for what each round makes anew.

        Raises:
            PrivacyError: see :meth:`permit`.
            KeptBackError: the update isn't fit to be summed.
        """
        self.permit(experiment, asked)
        (run, number), recipe = place_of(asked), recipe_digest(experiment)
        folder = self._folder(experiment, run)
        before = checkpoint.load(folder / SECRET)
        norms = [] if before is None else list(before["norms"])
        length = self._checked(update, norms, experiment, guard)
        topic = topic_of(experiment, asked)
        site = SecureSite.begin(topic=topic, name=self.name, quorum=experiment.federation.quorum)
        most = 1 if alike(experiment) else experiment.federation.max_cases
        if cases > most > 1:
            self._note(f"round {number + 1}: counts for {most} cases, of {cases} (federation.max_cases)")
        weight = max(1, min(cases, most))
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in update.items()}
        unsent = {"topic": topic, "weight": weight, "clip": asked.text.get("clip"), "update": tensors}
        checkpoint.save(folder / UNSENT, unsent)
        about = {"run": run, "round": number, "norms": [*norms, length][-REMEMBERED:]}
        checkpoint.save(folder / SECRET, {**about, "once": once, "site": site.plain()})
        checkpoint.save(self.directory / ASKED, {"rounds": {**self._asked(), recipe: [number, question_of(asked)]}})
        forget_old(folder, self._note)
        return site.keys(self._sign()).plain()

    def answer(self, experiment: Experiment, parcel: Parcel) -> Parcel:
        """Answer a stage of secure aggregation.

        Raises:
            FederationError: this site sits the round out; the message says why.
            PrivacyError: it would be the sum of what was summed before among other sites.
        """
        stage, (run, number) = cast(Stage, parcel.text["ask"]), place_of(parcel)
        folder = self._folder(experiment, run)
        secret = checkpoint.load(folder / SECRET)
        if secret is None or secret["run"] != run:
            raise FederationError(f"site {self.name}: has no keys of this run")
        if secret["round"] != number:
            raise FederationError(
                f"site {self.name}: has no keys of round {number + 1} of this run, but of {secret['round'] + 1}"
            )
        site = SecureSite(**secret["site"])
        topic = site.topic
        said = {key: value for key, value in parcel.text.items() if key not in ("ask", "experiment", "round", "run")}
        text, masked = site.answer(
            stage, said, signer=self._sign(), codes=lambda sites: self._codes(folder, experiment, topic, sites)
        )
        if stage == "shares" and self._signer_of is not None:
            self._recognise(said)
        if secret["once"] is not None and stage in ("shares", "confirm"):
            names = sorted(site.roster) if stage == "shares" else sorted(site.survivors)
            self._among(str(secret["once"]), names, settled=stage == "confirm")
        if masked is not None:
            words = masked.view(masked.dtype.str.replace("u", "i"))
            checkpoint.save(folder / MASKED, {"topic": topic, "masked": torch.from_numpy(words)})
        checkpoint.save(folder / SECRET, {**secret, "site": site.plain()})
        if stage != "masked":
            return Parcel(text=text)
        (folder / UNSENT).unlink(missing_ok=True)
        return Parcel(text=text, arrays={"masked": self._masked(folder, topic)})

    def _masked(self, folder: Path, topic: str) -> Codes:
        kept: Mapping[str, Any] = checkpoint.load(folder / MASKED) or {}
        if kept.get("topic") != topic:
            raise FederationError(f"site {self.name}: its masked update of this round is gone")
        words: Codes = kept["masked"].numpy()
        return words.view(words.dtype.str.replace("i", "u"))

    def _checked(self, update: Weights, norms: list[float], experiment: Experiment, guard: FirstRound | None) -> float:
        """The update's norm, if it is fit: under a mask no server can look."""
        length = norm(update)
        if not math.isfinite(length):
            broken = f"site {self.name}: its update holds NaN or infinite values, and is kept back"
            raise KeptBackError(broken, broken)
        federation = experiment.federation
        if federation.privacy.on:  # it is clipped to what all may have
            return length
        reason = too_long(length, usual_norm(norms), outlier=federation.outlier, most=federation.max_norm)
        if reason is None and not norms and guard is not None:
            moved = {name: value for name, value in update.items() if name not in guard.statistics}
            reason = beyond(norm(moved), guard.farthest)
        if reason is not None:
            raise KeptBackError(
                f"site {self.name}: keeps its update back: it is too long (federation.outlier, federation.max_norm, "
                "or what the recipe can reach in a first round); the site's own audit log says more",
                f"site {self.name}: keeps its update back: {reason}",
            )
        return length

    def _codes(self, folder: Path, experiment: Experiment, topic: str, sites: int) -> Codes:
        kept: Mapping[str, Any] = checkpoint.load(folder / UNSENT) or {}
        if kept.get("topic") != topic:
            raise FederationError(f"site {self.name}: its update of this round is gone")
        point = fixed_point(sites=sites, alike=alike(experiment), heaviest=experiment.federation.max_cases)
        row = flat({name: value.numpy() for name, value in kept["update"].items()})
        if experiment.federation.privacy.on:
            row = _bounded(row, kept["clip"], point.step)
        cut = int((np.abs(row) > point.reach).sum())
        if cut:
            self._note(f"{cut} of {row.size} entries of an update were beyond {point.reach:g}, and were cut to that")
        return point.encode(row, int(kept["weight"]))

    def _folder(self, experiment: Experiment, run: str) -> Path:
        return run_folder(self.directory, recipe_digest(experiment), run)

    def _recognise(self, said: Mapping[str, Any]) -> None:
        """Remember the certificates of a roster whose signatures were found true.

        Raises:
            FederationError: one is older than what the same site has shown before: its key was renewed since.
        """
        known: dict[str, int] = dict((checkpoint.load(self.directory / PEERS) or {}).get("issued", {}))
        for site, keys in read_roster(said.get("roster")).items():
            issued = issued_at(keys.certificate)
            if issued < known.get(site, issued):
                raise FederationError(
                    f"site {self.name}: the certificate of site {site!r} is older than one that it has shown before. "
                    "Its key was renewed, and the old one counts for nothing"
                )
            known[site] = issued
        checkpoint.save(self.directory / PEERS, {"issued": known})

    def _among(self, once: str, names: list[str], *, settled: bool) -> None:
        """Refuse another group than the one that this was summed among; remember it once it is ``settled``.

        Any two sums have more than half of their sites confirm them, so one that has confirmed both is among them.
        """
        groups: dict[str, list[str]] = dict((checkpoint.load(self.directory / GROUPS) or {}).get("groups", {}))
        before = groups.get(once)
        if before is not None and before != names:
            raise PrivacyError(
                f"site {self.name}: has told exact sums of these data among {', '.join(before)}, and is asked for them "
                f"among {', '.join(names)}. The difference could be one site's own. Plan by the first ones' "
                "fingerprint.json (--fingerprint), or ask for sums with noise (federation.fingerprint_epsilon)"
            )
        if settled and before is None:
            checkpoint.save(self.directory / GROUPS, {"groups": {**groups, once: names}})

    def _asked(self) -> dict[str, list[Any]]:
        """By recipe, the highest round that was answered and the digest of its question."""
        return dict((checkpoint.load(self.directory / ASKED) or {}).get("rounds", {}))

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
