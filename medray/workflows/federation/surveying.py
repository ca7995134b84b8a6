"""One plan for all sites without anybody's data: the fingerprint of all of them, out of sums.

The server asks for the schema, in which all have to agree, and then for sums over public bins. Under secure aggregation
it gets the sum of all sites' and no single one; with ``federation.fingerprint_epsilon`` each site's are noised before
they leave, and charged to its ledger.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from medray.config.federation import FederationConfig
from medray.config.privacy import PrivacyConfig
from medray.config.schema import Experiment
from medray.data.fingerprint import Fingerprint
from medray.data.fingerprint_sums import Layout, Schema, fingerprint_of, sums_of
from medray.data.manifest import Manifest
from medray.engines.flower.parcel import Hub, Parcel
from medray.errors import FederationError
from medray.privacy.accountant import PrivacyPlan, epsilon, noise_multiplier
from medray.privacy.noise import SecureRandom
from medray.privacy.policy import recipe_digest
from medray.privacy.secagg.roster import PublicKeys
from medray.train import checkpoint
from medray.workflows.federation.charging import Charge
from medray.workflows.federation.keeping import forget_old, place_of, run_folder
from medray.workflows.federation.sealing import Sealing, question_of, topic_of
from medray.workflows.federation.secure import open_round, read_keys

__all__ = ["SCHEMA", "SUMS", "SURVEYED", "Surveyed", "answer_sums", "asked_of", "survey", "surveying"]

SCHEMA, SUMS = "schema", "sums"
SURVEYED = "sums.pt"
"""What a site told of its sums; its presence says that a run is a survey, which trains nothing."""
BEGUN = "survey.pt"
"""In a run's folder: what its survey asks for, and by which name."""
SCALE = float(1 << 16)
"""Sums are divided by it, so that those of a million patients are within the reach of masked words."""

Row = npt.NDArray[np.float64]


def surveying(federation: FederationConfig, *, delta: float, seed: int = 0) -> Experiment:
    """The experiment that stands for a survey in questions: it says how sums are protected, and trains nothing.

    Args:
        federation: of the run.
        delta: of the run's privacy.
        seed: of the run: another one makes it another survey, where a site answers one of a kind.
    """
    how = federation.model_dump(include={"secure_aggregation", "quorum", "deadline", "attempts"})
    private = federation.fingerprint_epsilon
    tree: dict[str, Any] = {
        "data": "-",
        "seed": seed,
        "model": {"name": "linear"},
        "loss": {"name": "cross_entropy"},
        "train": {"precision": "fp32"},
        "federation": {**how, "rounds": 1, "local_steps": 1},
    }
    if private is not None:
        tree["privacy"] = {"epsilon": private, "delta": delta, "metric_noise": None}
    return Experiment.model_validate(tree)


def asked_of(explicit: Mapping[str, Any]) -> Experiment:
    """The same, from what a user set: there is no plan yet."""
    federation = Experiment.model_validate({"federation": explicit.get("federation") or {}}).federation
    delta = float((explicit.get("privacy") or {}).get("delta") or PrivacyConfig().delta)
    return surveying(federation, delta=delta, seed=int(explicit.get("seed") or 0))


# -- at a site


def answer_sums(
    manifest: Manifest, directory: Path, experiment: Experiment, parcel: Parcel, sealing: Sealing, charge: Charge | None
) -> Parcel:
    """A site's answer: its sums, or, under secure aggregation, the public keys to mask them with.

    To the same question it is the same, keys and noise included, and charged once; whatever is asked in other words is
    charged again. Exact sums are summed among one group of sites alone, whatever surveys ask for them: see ``sealing``.

    Args:
        manifest: of the site.
        directory: of the site.
        experiment: of :func:`surveying`.
        parcel: the question, with ``schema``.
        sealing: of the site.
        charge: to the site's ledger; None in a simulation.

    Raises:
        FederationError: the data have another schema, or the question isn't of the one round that a survey has.
        PrivacyError: over budget, or a sum was asked for before in other words.
    """
    (run, number), secure = place_of(parcel), experiment.federation.secure_aggregation
    if number:  # of a further one the sum, less that of the first, could be one site's
        raise FederationError(f"a survey has one round, 0; this question is of round {number}")
    try:
        schema = Schema.model_validate(parcel.text.get("schema"))
    except ValidationError as error:
        raise FederationError(f"what should be a schema of the data is none ({error.error_count()} faults)") from None
    layout = Layout(schema, coarse=experiment.privacy.on)
    if not layout.schema.fits(Schema.of(manifest)):
        raise FederationError("these data have another task, other axes, channels, classes or columns than all others")
    folder = run_folder(directory, recipe_digest(experiment), run)
    kept, question = checkpoint.load(folder / SURVEYED), question_of(parcel)
    if kept is None or kept["question"] != question:
        kept = {"question": question}
    if secure and "keys" not in kept:
        sealing.permit(experiment, parcel)
        sealing.ready()
    if "sums" not in kept:
        row, std = _noised(manifest, layout, experiment, charge)
        kept |= {"sums": torch.from_numpy(row / SCALE), "std": std}
        checkpoint.save(folder / SURVEYED, kept)
        forget_old(folder)
    sums, said = {"sums": kept["sums"].numpy()}, {"std": float(kept["std"])}
    if not secure:
        return Parcel(text=said, arrays=sums)
    if "keys" not in kept:  # a server that died and asks again goes on with the same ones
        once = None if layout.coarse else f"exact sums/{layout.schema.digest()}"
        kept["keys"] = sealing.begin(experiment, parcel, sums, 1, once=once)
        checkpoint.save(folder / SURVEYED, kept)
    return Parcel(text={**said, "keys": dict(kept["keys"])})


def _noised(manifest: Manifest, layout: Layout, experiment: Experiment, charge: Charge | None) -> tuple[Row, float]:
    """A site's sums, and the standard deviation of the noise on each entry."""
    privacy = experiment.privacy
    row = sums_of(manifest, layout)  # before anything is charged: a file that can't be read costs nothing
    if privacy.epsilon is None:
        return row, 0.0
    sigma = noise_multiplier(privacy.epsilon, privacy.delta, rate=1.0, steps=1)
    spent = epsilon([(sigma, 1.0, 1)], privacy.delta)
    plan = PrivacyPlan(
        noise_multiplier=sigma,
        sample_rate=1.0,
        steps=1,
        units=len({case.group for case in manifest.cases}),
        epsilon=spent.epsilon,
        delta=privacy.delta,
        accountant=spent.accountant,
        unit="patient",
        clip_norm=layout.sensitivity,
    )
    if charge is not None:
        charge(plan, 1)
    std = sigma * layout.sensitivity
    return row + std * SecureRandom().normal(layout.size), std


# -- at the server


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """What a survey came to.

    Attributes:
        fingerprint: of all sites that took part.
        sites: how many.
        said: how it was protected, in a sentence for the report.
    """

    fingerprint: Fingerprint
    sites: int
    said: str


def survey(
    hub: Hub,
    sites: tuple[str, ...],
    experiment: Experiment,
    directory: Path,
    *,
    authority: bytes | None,
    said: Callable[[str], None],
) -> Surveyed:
    """Ask the sites for the sums that a plan is made from.

    What is asked is written down before it is: called again, after a crash or for want of a quorum, it asks the very
    same, which costs the sites that have answered nothing and, under secure aggregation, is all that they answer to.

    Args:
        hub: the way to them.
        sites: who is there.
        experiment: of :func:`surveying`.
        directory: of the run.
        authority: certificate (PEM) to check sites' signatures by under secure aggregation; None in a simulation.
        said: hears who refuses, and why.

    Raises:
        FederationError: fewer than the quorum, with each site's reason; or too few patients for the noise.
    """
    federation = experiment.federation
    schema, run, agreed = _begun(hub, sites, experiment, directory, said)
    layout = Layout(schema, coarse=experiment.privacy.on)
    text = {
        "ask": SUMS,
        "experiment": experiment.model_dump(mode="json"),
        "run": run,
        "round": 0,
        "schema": schema.model_dump(mode="json"),
    }
    question = Parcel(text=text, arrays={"sums": np.zeros(layout.size)})
    present = set(hub.sites())
    answers = hub.ask("query", {name: question for name in agreed if name in present}, federation.deadline)
    good, refused = dict[str, Parcel](), list[str]()
    for name in agreed:
        answer = answers.get(name)
        if answer is not None and answer.error is None and _std(answer) is not None:
            good[name] = answer
            continue
        refused.append(f"{name}: {'no answer' if answer is None else answer.error or 'no sums'}")
    if len(good) < federation.quorum:
        for line in refused:
            said(line)
        raise _too_few(len(good), federation.quorum, refused)
    if federation.secure_aggregation:
        total, noise, count = _opened(hub, experiment, question, good, authority, refused)
    else:
        total, noise, count = _added(good, layout.size, refused)
    for line in refused:
        said(line)
    if count < federation.quorum:
        raise _too_few(count, federation.quorum, refused)
    found = fingerprint_of(total * SCALE, layout, noise=noise)
    return Surveyed(fingerprint=found, sites=count, said=_said(experiment, noise, count))


def _begun(
    hub: Hub, sites: tuple[str, ...], experiment: Experiment, directory: Path, said: Callable[[str], None]
) -> tuple[Schema, str, tuple[str, ...]]:
    """What all have to agree in, the survey's name, and who is to be asked: all, where it goes on with a former one.

    A site whose data have come to be of another schema since refuses by itself.
    """
    path, recipe = directory / BEGUN, recipe_digest(experiment)
    begun = checkpoint.load(path)
    if begun is not None and begun["recipe"] == recipe:
        return Schema.model_validate_json(begun["schema"]), str(begun["run"]), sites
    schema, agreed = _schema(hub, sites, experiment.federation, said)
    run = secrets.token_hex(16)
    checkpoint.save(path, {"recipe": recipe, "run": run, "schema": schema.model_dump_json()})
    return schema, run, agreed


def _schema(
    hub: Hub, sites: tuple[str, ...], federation: FederationConfig, said: Callable[[str], None]
) -> tuple[Schema, tuple[str, ...]]:
    """What all have to agree in, and who does."""
    present, question = set(hub.sites()), Parcel(text={"ask": SCHEMA})
    answers = hub.ask("query", {name: question for name in sites if name in present}, federation.deadline)
    found: dict[str, Schema] = {}
    refused: list[str] = []
    for name in sites:
        answer = answers.get(name)
        reason = "no answer" if answer is None else answer.error
        if reason is None and answer is not None:
            try:
                found[name] = Schema.model_validate(answer.text.get("schema"))
                continue
            except ValidationError:
                reason = "no schema"
        refused.append(f"{name}: {reason}")
    for line in refused:
        said(line)
    if len(found) < federation.quorum:
        raise _too_few(len(found), federation.quorum, refused)
    names = sorted(found)
    for name in names[1:]:
        for what in Schema.model_fields:
            mine, its = getattr(found[names[0]], what), getattr(found[name], what)
            if mine != its and what != "modality":
                raise FederationError(
                    f"site {name}: its data have {what} {its}, those of site {names[0]} {mine}. All sites need the same"
                )
    return found[names[0]], tuple(names)


def _added(answers: Mapping[str, Parcel], size: int, refused: list[str]) -> tuple[Row, float, int]:
    """The sum of what each site sent, the noise on it, and how many did."""
    total, variance, count = np.zeros(size), 0.0, 0
    for name, answer in answers.items():
        sums = answer.arrays.get("sums")
        if sums is None or sums.dtype != np.float64 or sums.shape != total.shape or not np.isfinite(sums).all():
            refused.append(f"{name}: its sums aren't {size} finite numbers")
            continue
        total, variance, count = total + sums.astype(np.float64), variance + (_std(answer) or 0.0) ** 2, count + 1
    return total, math.sqrt(variance), count


def _opened(
    hub: Hub,
    experiment: Experiment,
    question: Parcel,
    answers: Mapping[str, Parcel],
    authority: bytes | None,
    refused: list[str],
) -> tuple[Row, float, int]:
    """The same by secure aggregation: nobody's sums are seen."""
    keys: dict[str, PublicKeys] = {}
    topic = topic_of(experiment, question)
    for name, answer in answers.items():
        try:
            keys[name] = read_keys(answer, name, topic, keys, authority)
        except FederationError as error:
            refused.append(f"{name}: {error}")
    opened = open_round(hub, experiment, question, keys)
    refused += [f"{name}: {why}" for name, (_, why) in sorted(opened.lost.items())]
    if opened.mean is None:
        raise FederationError(f"the sites' sums can't be had: {opened.reason}. {'; '.join(refused)}")
    there = [_std(answers[name]) or 0.0 for name in keys if name not in opened.lost]
    return opened.mean * opened.sites, math.sqrt(sum(std**2 for std in there)), opened.sites


def _std(answer: Parcel) -> float | None:
    """Of a site's noise, as it says."""
    value = answer.text.get("std")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        return None
    return float(value)


def _too_few(count: int, quorum: int, refused: list[str]) -> FederationError:
    return FederationError(
        f"{count} of {quorum} sites (federation.quorum) tell of their data. {'; '.join(refused)}. Plan on public data "
        "instead, and give that plan's with --fingerprint"
    )


def _said(experiment: Experiment, noise: float, sites: int) -> str:
    how = "the sum alone was seen" if experiment.federation.secure_aggregation else "each site's were seen"
    if not noise:
        return f"The plan was made from exact sums over {sites} sites' data; {how}."
    return (
        f"The plan was made from sums over {sites} sites' data with noise of each site, of epsilon "
        f"{experiment.privacy.epsilon:g} at delta {experiment.privacy.delta:g} for each patient, beside what training "
        f"spends; {how}."
    )
