"""What a federation's organiser and its sites write: ``sites.yaml`` and ``site.yaml``."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from medray.config.federation import FEWEST_UNSEEN
from medray.config.paths import did_you_mean
from medray.config.schema import Positive, Section
from medray.config.yamlfile import read_yaml
from medray.errors import ConfigError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""Of a federation or a site: it becomes a folder, a file and a certificate's name."""
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]{1,253}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ClassName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f<>]*$")]
Port = Annotated[int, Field(ge=1, le=65535)]

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class ServerAddress(Section):
    """Where sites reach the server."""

    host: Host
    port: Port = 9443
    also: tuple[Host, ...] = Field((), max_length=32, description="other names and addresses of the same machine")


class InvitedSite(Section):
    """A hospital that takes part."""

    name: Name
    organisation: str = Field("", max_length=200, pattern=r"^[^\x00-\x1f<>]*$")


class Invitation(Section):
    """``sites.yaml``: what ``medray federate provision`` makes keys and start-up kits for."""

    name: Name
    server: ServerAddress
    days: int = Field(365, ge=1, le=3650, description="how long certificates are valid")
    classes: tuple[ClassName, ...] = Field((), max_length=1000, description="in the order that all sites shall use")
    sites: tuple[InvitedSite, ...] = Field(min_length=1, max_length=1000)

    @field_validator("sites")
    @classmethod
    def _distinct(cls, sites: tuple[InvitedSite, ...]) -> tuple[InvitedSite, ...]:
        names = [site.name for site in sites]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each site needs a name of its own; {', '.join(twice)} stands there twice")
        return sites


class SitePrivacy(Section):
    """What leaves only under differential privacy, and how much of it may leave."""

    required: bool = Field(True, description="refuse runs without differential privacy")
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="the largest delta that a run may state")
    epsilon_per_run: Positive = Field(3.0, description="the most that one run may spend")
    epsilon_per_year: Positive = Field(8.0, description="the most that all runs of a year may spend together")
    epsilon_ever: Positive = Field(20.0, description="the most that will ever be spent here")
    least_noise: float = Field(0.3, ge=0.0, allow_inf_nan=False, description="smallest noise multiplier")
    unit: tuple[Literal["record", "patient"], ...] = Field(
        ("record", "patient"), description="what may be protected: record, patient"
    )
    require_secure_aggregation: bool = Field(
        False, description="refuse runs whose server would see this site's updates by themselves"
    )
    least_sites: int = Field(
        FEWEST_UNSEEN,
        ge=FEWEST_UNSEEN,
        le=1000,
        description="refuse runs under secure aggregation with a smaller quorum: no sum may be over fewer sites",
    )
    share_fingerprint: bool = Field(
        False, description="let exact counts, shapes and intensities of the data leave, for a plan made from all sites"
    )


class SiteAllows(Section):
    """Which runs this site takes part in; an empty list allows all of its kind."""

    recipes: tuple[Digest, ...] = Field((), description="content hashes, as `medray federate run` prints them")
    models: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    rounds: int = Field(1000, ge=1, description="the most rounds of a run")
    local_epochs: int = Field(10, ge=1, description="the most passes over the data in one round")
    local_steps: int = Field(
        10_000, ge=1, description="the most optimiser steps in one round, where a run counts by federation.local_steps"
    )
    hours: str | None = Field(None, description="local time in which work may begin, such as 19:00-06:00; null: always")

    @field_validator("hours")
    @classmethod
    def _range(cls, value: str | None) -> str | None:
        if value is not None and not _HOURS.fullmatch(value):
            raise ValueError(f"hours={value!r} must be a range of local time, such as 19:00-06:00")
        return value


class SiteConfig(Section):
    """``site.yaml``: a hospital's own rules. Paths are relative to the file; nothing that arrives can change it."""

    federation: Name
    name: Name
    server: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]{1,253}:\d{1,5}$", description="host:port")]
    ca: Path = Field(Path("ca.crt"), description="the certificate that the server has to show a signature of")
    key: Path = Field(Path("node.key"), description="this site's own; it never leaves it")
    certificate: Path = Field(Path("node.crt"), description="of that key; other sites know this one by it")
    data: str = Field(description="the images: as `medray check` takes them")
    labels: dict[str, str] = Field(
        default_factory=dict, max_length=1000, description="this site's name of a class: theirs"
    )
    classes: tuple[str, ...] = Field(
        (), max_length=4096, description="of the federation, in its order; empty: the data's"
    )
    fewest: int = Field(20, ge=1, description="patients below which nothing is released")
    cpus: int | None = Field(None, ge=1, le=1024, description="threads to train with; null: all")
    memory_gb: Positive | None = Field(None, description="the most that a run may use; null: no limit")
    ledger: Path = Field(Path("ledger.jsonl"), description="what was spent of the privacy budget; keep it for ever")
    audit: Path = Field(Path("audit.jsonl"), description="every request, decision and release")
    work: Path = Field(Path("work"), description="prepared cases and checkpoints")
    privacy: SitePrivacy = SitePrivacy()
    allow: SiteAllows = SiteAllows()

    @model_validator(mode="after")
    def _budgets(self) -> SiteConfig:
        limits = self.privacy
        if not limits.epsilon_per_run <= limits.epsilon_per_year <= limits.epsilon_ever:
            raise ValueError(
                f"privacy.epsilon_per_run={limits.epsilon_per_run:g}, epsilon_per_year={limits.epsilon_per_year:g} and "
                f"epsilon_ever={limits.epsilon_ever:g}: each must be at most the next"
            )
        return self

    def at(self, folder: Path) -> SiteConfig:
        """With paths made absolute from the folder of ``site.yaml``."""
        places = {
            name: (folder / getattr(self, name)).resolve()
            for name in ("ca", "key", "certificate", "ledger", "audit", "work")
        }
        return self.model_copy(update=places)


Model = TypeVar("Model", Invitation, SiteConfig)


def read_invitation(path: Path) -> Invitation:
    """Read ``sites.yaml``.

    Raises:
        ConfigError: names file, key, value and rule.
    """
    return _read(path, Invitation)


def read_site(path: Path) -> SiteConfig:
    """Read ``site.yaml``; its paths come back absolute.

    Raises:
        ConfigError: names file, key, value and rule.
    """
    return _read(path, SiteConfig).at(path.absolute().parent)


def _read(path: Path, model: type[Model]) -> Model:
    try:
        return model.model_validate(read_yaml(path))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            hint, where = "", ".".join(str(part) for part in problem["loc"]) or "the file"
            if problem["type"] == "extra_forbidden":
                near = difflib.get_close_matches(str(problem["loc"][-1]), _fields(model, problem["loc"][:-1]), n=2)
                hint = f". {did_you_mean(near)}" if near else ""
            value = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
            lines.append(f"{path}: {where}{value}: {problem['msg']}{hint}")
        raise ConfigError("\n".join(lines)) from None


def _fields(model: type[Section], place: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at ``place``."""
    for part in place:
        kind = model.model_fields[str(part)].annotation if part in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            break
        model = kind
    return list(model.model_fields)
