"""What a user may ask of differential privacy: the section ``privacy`` of an Experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medray.config.section import NonNegative, Positive, Section

__all__ = ["PrivacyConfig"]


class PrivacyConfig(Section):
    """Training under (epsilon, delta) differential privacy by DP-SGD (Abadi et al. 2016, arXiv:1607.00133)."""

    epsilon: Positive | None = Field(
        None, description="what the whole run may spend, released figures included; null: no differential privacy"
    )
    delta: float = Field(1e-5, gt=0, lt=0.1, description="must be below one over the number of patients or records")
    clip_norm: float = Field(
        1.0,
        ge=1e-6,  # beyond these, single precision itself would break the bound
        le=1e6,
        description="largest norm of what one patient or record adds to a step's gradient",
    )
    noise_multiplier: Positive | None = Field(
        None, description="noise's standard deviation over clip_norm; null: the least that holds epsilon over all steps"
    )
    unit: Literal["record", "patient"] = Field(
        "patient", description="what is protected; patient: one image of a drawn patient a step, whichever comes by lot"
    )
    accountant: Literal["prv", "rdp"] = Field("prv", description="where prv fails numerically, rdp is taken, and named")
    mode: Literal["auto", "hooks", "functorch", "ghost", "loop"] = Field(
        "auto",
        description="how gradients of single samples come about; auto: the loop on a CPU, else what the network allows",
    )
    physical_batch: int | None = Field(
        None, ge=1, description="samples at once in memory; null: train.micro_batch, or 32. Changes no result"
    )
    metric_noise: NonNegative | None = Field(
        5.0,
        description="noise multiplier of the validation figure that is released, charged to epsilon; null: no figure",
    )
    secure: bool = Field(True, description="noise and lots from the system's cryptographic generator; false: for tests")
    ledger: str | None = Field(None, description="a site's ledger file, which the run is charged to; null: none")

    @property
    def on(self) -> bool:
        """Whether training is to be differentially private."""
        return self.epsilon is not None

    @model_validator(mode="after")
    def _makes_sense(self) -> PrivacyConfig:
        if self.metric_noise == 0:
            raise ValueError(
                "privacy.metric_noise=0 would release an exact figure; give a number > 0, or null for none"
            )
        if self.epsilon is None and (self.noise_multiplier is not None or self.ledger is not None):
            raise ValueError(
                "privacy.noise_multiplier and privacy.ledger need privacy.epsilon, the bound that has to hold; set it"
            )
        return self
