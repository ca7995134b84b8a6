"""A site's own rules, applied to what a run asks of it, before data are touched, in words that both sides can read."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from medray.config.federation_files import SiteConfig
from medray.config.schema import Experiment
from medray.errors import PolicyError, WithheldError

_SITES_OWN = {"data": True, "device": True}
"""Fields of a recipe that a site fills in for itself."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run asks of a site.

    Attributes:
        recipe: content hash, see :func:`recipe_digest`.
        model, strategy: names.
        rounds: of the whole run.
        local_epochs: passes over the data of one round; None where it is told in steps.
        local_steps: of the optimiser in one round; None where it is told in passes.
        epsilon, delta: that the whole run may spend here; None without differential privacy.
        noise: smallest noise multiplier of a step; None without differential privacy.
        unit: what is protected, ``record`` or ``patient``.
        secure_aggregation: whether the server sees sums of updates alone.
        quorum: sites that it takes to open a sum, at the least.
    """

    recipe: str
    model: str
    strategy: str
    rounds: int
    local_epochs: int | None = None
    local_steps: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    noise: float | None = None
    unit: str = "record"
    secure_aggregation: bool = False
    quorum: int = 0


def recipe_digest(experiment: Experiment) -> str:
    """SHA-256 of everything that an experiment decides, but for what each site fills in itself."""
    content = experiment.model_dump(mode="json", exclude=_SITES_OWN)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def decide(rules: SiteConfig, request: Request, *, now: dt.datetime, spent: float, patients: int) -> None:
    """Let a request pass, or refuse it with every reason that there is.

    No reason that the asker hears depends on how many cases there are, or holds what was spent, which does.

    Args:
        rules: the site's.
        request: of the run.
        now: local time.
        spent: epsilon that runs have spent or reserved here since the ledger's year was opened, but for this one's.
        patients: that would train.

    Raises:
        WithheldError: the site doesn't take part; each reason names the value, the rule and its key in ``site.yaml``.
    """
    reasons = [
        *_of_the_run(rules, request),
        *_of_privacy(rules, request),
        *_of_this_moment(rules, now, patients),
    ]
    _refuse(rules, "", reasons, _of_the_year(rules, request, spent), "Its owner decides, in site.yaml")


def decide_survey(rules: SiteConfig, request: Request, *, now: dt.datetime, spent: float, patients: int) -> None:
    """The same for sums that a plan is made from, which train nothing: no recipe and no network is asked about.

    Exact ones leave a site that demands privacy only where ``privacy.share_fingerprint`` says so.

    Raises:
        WithheldError: with the reasons.
    """
    privacy = rules.privacy.model_copy(
        update={"required": rules.privacy.required and not rules.privacy.share_fingerprint}
    )
    own = rules.model_copy(update={"privacy": privacy})
    reasons = [*_of_privacy(own, request), *_of_this_moment(rules, now, patients)]
    cure = (
        "With federation.fingerprint_epsilon they have noise on them; privacy.share_fingerprint lets exact ones leave. "
        "Its owner decides, in site.yaml"
    )
    _refuse(rules, " to tell sums of its data", reasons, _of_the_year(rules, request, spent), cure)


def decide_fingerprint(rules: SiteConfig, *, now: dt.datetime, patients: int) -> None:
    """The same for a fingerprint of this site alone, which is exact, and which the server sees by itself.

    Raises:
        PolicyError: with the reason.
    """
    decide_moment(rules, now=now, patients=patients)
    limits = rules.privacy
    for demanded in ("required", "require_secure_aggregation"):
        if getattr(limits, demanded) and not limits.share_fingerprint:
            raise PolicyError(
                f"site {rules.name!r} refuses: a fingerprint holds exact counts and intensities of its data, and "
                f"privacy.{demanded} is true and privacy.share_fingerprint false. Ask for sums under "
                "federation.secure_aggregation, or with noise on them (federation.fingerprint_epsilon), or plan on "
                "public data (--fingerprint)"
            )


def decide_moment(rules: SiteConfig, *, now: dt.datetime, patients: int) -> None:
    """Refuse what would come from too few patients, or outside of the site's hours.

    Raises:
        PolicyError: with the reasons.
    """
    reasons = list(_of_this_moment(rules, now, patients))
    if reasons:
        raise PolicyError(f"site {rules.name!r} refuses: {'; '.join(reasons)}. Its owner decides, in site.yaml")


def _refuse(rules: SiteConfig, what: str, reasons: Iterable[str], withheld: tuple[str, str] | None, cure: str) -> None:
    """Raise where there is any reason; of one that is withheld the asker hears the first form alone."""
    said, exactly = list(reasons), list(reasons)
    if withheld is not None:
        said.append(withheld[0])
        exactly.append(withheld[1])
    if said:
        begin = f"site {rules.name!r} refuses{what}: "
        raise WithheldError(f"{begin}{'; '.join(said)}. {cure}", f"{begin}{'; '.join(exactly)}. {cure}")


def _of_the_run(rules: SiteConfig, request: Request) -> Iterator[str]:
    allow = rules.allow
    if allow.recipes and request.recipe not in allow.recipes:
        yield f"recipe {request.recipe} is none of allow.recipes"
    if allow.models and request.model not in allow.models:
        yield f"model {request.model[:100]!r} is none of allow.models ({', '.join(allow.models)})"
    if allow.strategies and request.strategy not in allow.strategies:
        yield f"strategy {request.strategy!r} is none of allow.strategies ({', '.join(allow.strategies)})"
    if request.rounds > allow.rounds:
        yield f"{request.rounds} rounds are more than allow.rounds={allow.rounds}"
    if request.local_epochs is not None and request.local_epochs > allow.local_epochs:
        passes = f"{request.local_epochs} passes over the data in a round"
        yield f"{passes} are more than allow.local_epochs={allow.local_epochs}"
    # Steps are not held against passes: by which number of them a site refuses, its number of cases could be told.
    if request.local_steps is not None and request.local_steps > allow.local_steps:
        yield f"{request.local_steps} steps in a round are more than allow.local_steps={allow.local_steps}"


def _of_privacy(rules: SiteConfig, request: Request) -> Iterator[str]:
    limits = rules.privacy
    if limits.require_secure_aggregation and not request.secure_aggregation:
        yield (
            "the server would see this site's updates (federation.secure_aggregation is false), and "
            "privacy.require_secure_aggregation is true"
        )
    if request.secure_aggregation and request.quorum < limits.least_sites:
        yield (
            f"a sum of updates may be over {request.quorum} sites (federation.quorum), fewer than "
            f"privacy.least_sites={limits.least_sites}"
        )
    if request.epsilon is None:
        if limits.required:
            yield "the run has no differential privacy (privacy.epsilon is unset), and privacy.required is true"
        return
    if request.epsilon > limits.epsilon_per_run:
        yield f"epsilon {request.epsilon:g} is more than privacy.epsilon_per_run={limits.epsilon_per_run:g}"
    if request.delta is None or request.delta > limits.delta:
        yield f"delta {request.delta} is more than privacy.delta={limits.delta:g}"
    if request.noise is not None and request.noise < limits.least_noise:
        yield f"noise multiplier {request.noise:.3g} is less than privacy.least_noise={limits.least_noise:g}"
    if request.unit not in limits.unit:
        yield f"unit {request.unit!r} is none of privacy.unit ({', '.join(limits.unit)})"


def _of_the_year(rules: SiteConfig, request: Request, spent: float) -> tuple[str, str] | None:
    """For the asker, and for the site's own log: what runs cost here depends on how many cases there are."""
    most = rules.privacy.epsilon_per_year
    if request.epsilon is None or spent + request.epsilon <= most:
        return None
    rule = f"is more than privacy.epsilon_per_year={most:g}"
    return (
        f"epsilon {request.epsilon:g} on top of what was spent this year {rule}",
        f"epsilon {request.epsilon:g} on top of {spent:.3g} spent this year {rule}",
    )


def _of_this_moment(rules: SiteConfig, now: dt.datetime, patients: int) -> Iterator[str]:
    if patients < rules.fewest:
        yield f"its patients are fewer than fewest={rules.fewest}: too few to hide among"  # how many, nobody need know
    hours = rules.allow.hours
    if hours is not None and not within(hours, now.time()):
        yield f"it is {now:%H:%M} here, outside of allow.hours={hours}"


def within(hours: str, time: dt.time) -> bool:
    """Whether a time of day lies in a range such as ``19:00-06:00``, which may pass midnight."""
    begin, end = (dt.time.fromisoformat(part) for part in hours.split("-"))
    return begin <= time < end if begin < end else time >= begin or time < end
