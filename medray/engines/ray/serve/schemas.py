"""What the server's answers look like, for its OpenAPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medray.engines.ray.serve.answers import MEDIA
from medray.engines.ray.serve.fleet import Version


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Problem(_Answer):
    reason: str = Field(description="a word for programs")
    message: str


class Refusal(Problem):
    status: int | None = Field(None, description="that the answer will have")


class Error(_Answer):
    error: Problem


class ProtocolError(_Answer):
    error: str


class Health(_Answer):
    live: bool
    ready: bool | None = None


class Flag(_Answer):
    flag: str
    message: str


class Model(_Answer):
    name: str
    version: str
    bundle: str
    created: str


class Prediction(_Answer):
    """One image's answer."""

    model: Model
    engine: str
    precision: str
    fallback_reason: str | None = Field(description="why the engine isn't the one that was asked for")
    task: str
    intended_use: str
    classes: list[str] = Field(description="decided for (classification), or found (segmentation)")
    probabilities: dict[str, float] | None = Field(None, description="calibrated (classification)")
    voxels: dict[str, int] | None = Field(None, description="pixels in 2-D (segmentation)")
    volumes_ml: dict[str, float] | None = Field(None, description="3-D with a known spacing")
    uncertainty: float | None = Field(description="normalised entropy: 0 certain, 1 no idea; null: not measured")
    flags: list[Flag]
    seconds: dict[str, float]


class JobState(_Answer):
    """A prediction that nobody waits for."""

    id: str
    state: Literal["running", "done", "failed", "lost"] = Field(description="lost: send the image again")
    progress: float = Field(description="0 to 1, by the windows that the network has seen")
    created: str
    error: Refusal | None = Field(description="why there is no answer")


class Served(_Answer):
    """One version of a model."""

    name: str
    version: str
    share: float
    bundle: str
    created: str
    task: str
    ndim: int
    channels: int
    modality: str
    classes: list[str]
    engine: str
    precision: str
    fallback_reason: str | None
    metrics: dict[str, float | None]
    intended_use: str


class ModelList(_Answer):
    default: str | None
    models: list[Served]

    @classmethod
    def of(cls, versions: Sequence[Version], default: str | None) -> ModelList:
        """All that answer."""
        return cls(default=default, models=[_served(one) for one in versions])


class Status(_Answer):
    versions: dict[str, str]
    waiting: int
    config_error: str | None


def _served(one: Version) -> Served:
    spec = one.bundle.spec
    return Served(
        name=one.model,
        version=one.version,
        share=one.share,
        bundle=spec.name,
        created=spec.created,
        task=spec.kind,
        ndim=spec.ndim,
        channels=spec.channels,
        modality=spec.modality,
        classes=list(spec.classes),
        engine=one.about["engine"],
        precision=one.about["precision"],
        fallback_reason=one.about["fallback_reason"],
        metrics=dict(spec.metrics),
        intended_use=spec.intended_use,
    )


_BINARY = {"schema": {"type": "string", "format": "binary"}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {media: _BINARY for form, media in MEDIA.items() if form != "json"}}
}

PICTURES: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA["png"]: _BINARY, MEDIA["nifti"]: _BINARY}}}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of refusals."""
    return {status: {"model": Error} for status in statuses}


def protocol_refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of refusals, as the Open Inference Protocol has them."""
    return {status: {"model": ProtocolError} for status in statuses}
