"""Which of a study's models may be the champion, and which of those is: limits on what it costs to run, and a rule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from medray.config.expression import Formula
from medray.config.section import Positive, Section

__all__ = ["LimitsConfig", "SelectConfig"]

Rule = Literal["auto", "best", "pareto", "scorecard", "weighted"]


class LimitsConfig(Section):
    """What a champion must keep. Costs are measured through the exported model, on the machine that a report names."""

    accuracy: float | None = Field(
        None,
        allow_inf_nan=False,
        description="of the study's metric on validation cases: at least, or at most if less is better",
    )
    latency_ms: Positive | None = Field(None, description="median of one network input, batch 1, at most")
    latency_p95_ms: Positive | None = Field(None, description="its 95th percentile, at most")
    memory_mb: Positive | None = Field(None, description="peak memory of the process that answers, libraries included")
    size_mb: Positive | None = Field(None, description="of the exported model's file")
    parameters: int | None = Field(None, ge=1, description="of the network, or of all networks of an ensemble")

    @property
    def given(self) -> dict[str, float]:
        """Those that are set, by name."""
        return {name: float(value) for name, value in self if value is not None}


class SelectConfig(Section):
    """How the champion is chosen. ``accuracy`` is the study's own metric, whatever it is called."""

    rule: Rule = Field(
        "auto",
        description="best: by the metric; pareto: nearest to the ideal of those that no other beats in everything; "
        "scorecard: 40 points for accuracy, 30 speed, 20 memory, 10 size, each for limits kept; weighted: by "
        "select.expression; auto: pareto with several objectives, else best",
    )
    expression: str | None = Field(
        None, description="weighted: what to maximise, such as 0.7 * accuracy + 0.3 / latency_ms"
    )
    limits: LimitsConfig = LimitsConfig()
    on_fail: Literal["auto", "refuse", "last"] = Field(
        "auto",
        description="a model that breaks a limit: refuse it, or rank it last; auto: refuse, but last by scorecard",
    )

    @property
    def formula(self) -> Formula | None:
        """The expression, checked."""
        return None if self.expression is None else Formula.parse(self.expression)

    @property
    def refuses(self) -> bool:
        """Whether a model that breaks a limit can't be the champion."""
        return self.on_fail == "refuse" or (self.on_fail == "auto" and self.rule != "scorecard")

    @model_validator(mode="after")
    def _fits_together(self) -> SelectConfig:
        if (self.rule == "weighted") != (self.expression is not None):
            raise ValueError(
                f"select.rule={self.rule} and select.expression={self.expression!r}: weighted needs an expression, "
                "such as 0.7 * accuracy + 0.3 / latency_ms, and the other rules have no use for one"
            )
        if self.expression is not None:
            Formula.parse(self.expression)
        if self.rule == "scorecard" and not self.limits.given:
            raise ValueError(
                "select.rule=scorecard gives points for limits that are kept: set one at least under select.limits, "
                "such as latency_ms: 50"
            )
        return self
