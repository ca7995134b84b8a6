"""``federation:`` of an Experiment: how hospitals train one model together, and how a simulation deals cases out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medray.config.section import Duration, Fraction, NonNegative, Positive, Section

Strategy = Literal[
    "fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedbn", "scaffold", "median", "trimmed_mean", "krum"
]
ROBUST = ("median", "trimmed_mean", "krum")
FEWEST_UNSEEN = 3
"""Sites whose sum may be known under secure aggregation."""
HEAVIEST_SITE = 1 << 16
"""Training cases that a site can count for at most under secure aggregation."""
Pattern = Annotated[str, Field(min_length=1, max_length=200)]


class PartitionConfig(Section):
    """How a simulation deals the cases out to sites; patients stay whole."""

    by: Literal["site", "dirichlet", "quantity"] = Field(
        "site",
        description="site: the data's own (phantoms' sites have scanners of their own); dirichlet: classes by lot, "
        "unevenly; quantity: numbers of patients by lot, unevenly",
    )
    sites: int = Field(4, ge=2, le=1000, description="number of sites; by=site has as many as the data name")
    alpha: Positive = Field(0.5, description="of the Dirichlet distribution: small is uneven")
    seed: int = Field(0, ge=0, lt=2**31)


class CentralPrivacyConfig(Section):
    """Differential privacy of a whole site, by noise at the server, which is trusted with what comes before."""

    epsilon: Positive | None = Field(
        None, description="what all rounds together may tell of one site; null: no privacy by noise at the server"
    )
    delta: float = Field(1e-5, gt=0, lt=0.1, description="must be below one over the number of sites")
    clip_norm: float = Field(
        1.0, ge=1e-6, le=1e6, description="largest norm of a site's update; under adaptive that of the first round"
    )
    adaptive: bool = Field(True, description="clip_norm follows a quantile of the updates' norms, privately")
    quantile: float = Field(0.5, gt=0, lt=1, description="adaptive: share of the updates that shall not be clipped")
    rate: Positive = Field(0.2, description="adaptive: how fast")

    @property
    def on(self) -> bool:
        """Whether the server adds noise."""
        return self.epsilon is not None

    @model_validator(mode="after")
    def _makes_sense(self) -> CentralPrivacyConfig:
        idle = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.epsilon is None and idle:
            raise ValueError(
                f"federation.privacy.{idle[0]} needs federation.privacy.epsilon, the bound that has to hold; without "
                "it no noise is added. Set it"
            )
        return self


class FederationConfig(Section):
    """Rounds of local training and aggregation. Read by ``medray federate``; other verbs leave it alone."""

    strategy: Strategy = Field(
        "fedavg",
        description="fedavg: mean by training cases; fedprox: with a pull to the global weights at the sites; fedadam, "
        "fedyogi, fedadagrad: an adaptive step at the server; fedbn: norm layers stay at the site; scaffold: "
        "gradients are corrected by what sites have in common; median, "
        "trimmed_mean, krum: robust against bad updates, whatever the sites' sizes",
    )
    rounds: int = Field(20, ge=1, le=100_000)
    local_epochs: int = Field(1, ge=1, le=10_000, description="passes of a site over its training cases in one round")
    local_steps: int | None = Field(None, ge=1, description="optimiser steps of a site in one round, instead")
    fraction: Fraction = Field(1.0, gt=0.0, description="share of the sites asked in a round; at least quorum")
    quorum: int = Field(2, ge=1, le=1000, description="good updates that a round needs")
    deadline: Duration = Field(3600.0, description="how long a site may take for a round; later is late")
    attempts: int = Field(3, ge=1, le=1000, description="times that the missing are asked in a round, for the quorum")
    proximal_mu: NonNegative = Field(0.01, description="fedprox: strength of the pull")
    server_lr: Positive = Field(0.01, description="fedadam, fedyogi, fedadagrad: step of the server")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="fedadam, fedyogi: memory of the mean")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="fedadam, fedyogi: memory of the squares")
    tau: Positive = Field(1e-3, description="fedadam, fedyogi, fedadagrad: how adaptive; large is less")
    trim: float = Field(
        0.2, ge=0.0, lt=0.5, description="trimmed_mean: share of the sites left out at either end, one at the least"
    )
    byzantine: int = Field(1, ge=0, le=500, description="krum: how many sites may be bad")
    local: tuple[Pattern, ...] = Field(
        (), description="weights that stay at the site, by name or wildcard, such as head.*"
    )
    outlier: float = Field(
        20.0, gt=1.0, allow_inf_nan=False, description="an update longer than this many usual ones is quarantined"
    )
    max_norm: Positive | None = Field(None, description="an update longer than this is quarantined; null: no limit")
    compression: Literal["none", "int8", "topk"] = Field(
        "none", description="of updates on their way to the server; what is lost is sent with the next one"
    )
    secure_aggregation: bool = Field(
        False,
        description="the server sees the sum of the sites' updates alone; it takes three sites, and more than half of "
        "those that trained in a round, to open one",
    )
    max_cases: int = Field(
        HEAVIEST_SITE,
        ge=1,
        le=HEAVIEST_SITE,
        description="under secure aggregation, training cases that a site counts for at most: nobody else sees them",
    )
    fingerprint_epsilon: Positive | None = Field(
        None,
        description="what the plan's fingerprint may tell of each site's patients, by noise at the sites, beside "
        "privacy.epsilon; null: exact, which a site that demands privacy refuses",
    )
    top: float = Field(0.05, gt=0.0, le=1.0, description="topk: share of the entries that are sent")
    privacy: CentralPrivacyConfig = CentralPrivacyConfig()
    partition: PartitionConfig = PartitionConfig()

    @model_validator(mode="after")
    def _possible(self) -> FederationConfig:
        if self.strategy == "krum" and self.quorum < self.byzantine + 3:
            raise ValueError(
                f"federation.strategy=krum with byzantine={self.byzantine} needs a quorum of at least "
                f"{self.byzantine + 3} (n - f - 2 >= 1 neighbours); it is {self.quorum}"
            )
        if self.privacy.on and self.strategy in ROBUST:
            raise ValueError(
                f"federation.strategy={self.strategy} can be moved far by a single site, so that no noise of "
                "federation.privacy.epsilon would hide it. Choose fedavg, fedprox, fedadam, fedyogi or fedadagrad"
            )
        if self.privacy.on and (self.strategy == "fedbn" or self.local):
            what = "strategy=fedbn" if self.strategy == "fedbn" else f"local={list(self.local)}"
            raise ValueError(
                f"federation.{what} under federation.privacy.epsilon: those weights would stay at the site without "
                "noise, and its model would not be private. Choose another strategy, and leave federation.local empty"
            )
        if self.strategy == "scaffold":
            self._possible_corrected()
        if self.secure_aggregation:
            self._possible_unseen()
        return self

    def _possible_corrected(self) -> None:
        """What control variates can be told from."""
        if self.local_steps is None:
            raise ValueError(
                "federation.strategy=scaffold tells control variates from updates and the number of steps, which has "
                "to be the same everywhere: set federation.local_steps"
            )
        other = "compression" if self.compression != "none" else "secure_aggregation" if self.secure_aggregation else ""
        if self.privacy.on or other:
            raise ValueError(
                f"federation.strategy=scaffold with federation.{other or 'privacy.epsilon'}: the server tells control "
                "variates from each site's whole update, which it wouldn't have. Choose fedavg or fedprox"
            )

    def _possible_unseen(self) -> None:
        """What can be done with a sum alone."""
        if self.strategy in ROBUST:
            raise ValueError(
                f"federation.strategy={self.strategy} compares the sites' updates with each other, and under "
                "federation.secure_aggregation nobody sees any: the server has their sum alone. Choose fedavg, "
                "fedprox, fedadam, fedyogi or fedadagrad"
            )
        if self.compression != "none":
            raise ValueError(
                f"federation.compression={self.compression} can't be summed under federation.secure_aggregation: each "
                "site's codes have a scale, or places, of their own. Set it to none; updates are quantised alike there"
            )
        if self.quorum < FEWEST_UNSEEN:
            raise ValueError(
                f"federation.quorum={self.quorum} under federation.secure_aggregation must be {FEWEST_UNSEEN} or more: "
                "of a sum of two each site can take away its own, and has the other's"
            )
