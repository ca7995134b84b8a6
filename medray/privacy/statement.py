"""What a private run may say of itself: epsilon, and all that it rests on. Reports, cards and results print these."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from medray.privacy.accountant import PrivacyPlan

__all__ = ["Statement", "statement"]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """Of one run.

    Attributes:
        epsilon, delta: spent.
        accountant: prv or rdp.
        unit: what one neighbour has and the other has not.
        units: of them on the training side.
        noise_multiplier, sample_rate, steps, clip_norm: of the mechanism.
        figures: validation figures released with noise, within epsilon.
        metric_noise: noise multiplier of those; None where none was released.
        mode: how per-sample gradients came about.
        secure: whether noise and lots came from a cryptographic generator.
        ledger: whether a site's ledger was charged.
    """

    epsilon: float
    delta: float
    accountant: str
    unit: str
    units: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    clip_norm: float
    figures: tuple[str, ...]
    metric_noise: float | None
    mode: str
    secure: bool
    ledger: bool

    def lines(self) -> tuple[str, ...]:
        """Sentences for people, the figure first."""
        by = {"prv": "PRV (numerical composition, upper bound)", "rdp": "RDP (Rényi moments)"}.get(
            self.accountant, self.accountant
        )
        one = "patient, with all images," if self.unit == "patient" else "image (record)"
        figures = (
            f"Released with it, with noise and within epsilon: {', '.join(self.figures)}."
            if self.figures
            else "No figure measured on private cases was released with it."
        )
        lines = [
            f"Differentially private: epsilon {self.epsilon:.3f} at delta {self.delta:g}, by the {by} accountant.",
            f"Neighbouring data sets differ in one {one} of the training side, added or removed.",
            f"DP-SGD: {self.steps} steps, each on a Poisson sample of rate {self.sample_rate:.4g}; gradients clipped "
            f"to norm {self.clip_norm:g}, noise multiplier {self.noise_multiplier:.4g} ({self.mode}).",
            "Noise and lots come from the system's cryptographic generator."
            if self.secure
            else "Noise and lots could be foretold (privacy.secure=false): this is a test, and protects nobody.",
            figures,
            "Not covered: how patients were dealt to training and validation, the shapes, spacings and class names "
            "that the plan was made from, choices made by people who saw the data, and running times.",
        ]
        if not self.ledger:
            lines.append("No ledger was charged: what other runs on the same patients spent is not in this epsilon.")
        return tuple(lines)

    def plain(self) -> dict[str, Any]:
        """For ``result.json``."""
        return {**asdict(self), "neighbours": f"add or remove one {self.unit}", "sampling": "poisson"}


def statement(
    plan: PrivacyPlan, *, steps: int, figures: tuple[str, ...], mode: str, secure: bool, ledger: bool
) -> Statement:
    """Of a run that made ``steps`` of the plan's steps; what was to be released counts, whether it was or not."""
    spent = plan.spent(steps)
    return Statement(
        epsilon=spent.epsilon,
        delta=spent.delta,
        accountant=spent.accountant,
        unit=plan.unit,
        units=plan.units,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=steps,
        clip_norm=plan.clip_norm,
        figures=figures,
        metric_noise=plan.released[0][0] if plan.released else None,
        mode=mode,
        secure=secure,
        ledger=ledger,
    )
