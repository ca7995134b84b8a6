"""ServeConfig: everything that decides a server, typed and validated. Sizes are MiB, times seconds.

The file is the desired state: the server follows its ``models`` while it runs (see ``medray serve --help``).
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from medray.config.schema import Duration, NonNegative, Section
from medray.config.yamlfile import read_yaml
from medray.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]


class VersionConfig(Section):
    """One version of a model."""

    bundle: str = Field(description="the bundle's folder; a relative one starts from the configuration's own folder")
    share: NonNegative = Field(
        1.0, description="of the requests that name no version, over the sum of all shares; 0: only when asked for"
    )

    @field_validator("bundle")
    @classmethod
    def _folder(cls, value: str) -> str:
        if value.startswith("models:/"):
            raise ValueError(
                f"{value}: an alias may move, and with it the model; so a file names a folder. 'medray serve {value}' "
                "says which it is"
            )
        return value


class ModelEntry(Section):
    """A model that clients name, and its versions side by side."""

    versions: dict[Name, VersionConfig] = Field(min_length=1, max_length=32)
    runtime: Literal["auto", "torch", "onnx", "openvino", "tensorrt"] = Field(
        "auto",
        description="what computes; it reproduces the bundle's golden outputs before the first answer. auto: the "
        "fastest here that does, measured once",
    )
    precision: Literal["fp32", "bf16", "fp16", "int8"] | None = Field(
        None, description="of the arithmetic; null: the bundle's own, and with auto any that agrees"
    )

    @model_validator(mode="after")
    def _somewhere(self) -> ModelEntry:
        if not sum(version.share for version in self.versions.values()):
            raise ValueError("every version has share 0, so that no request could be answered; give one a share")
        return self


class LimitsConfig(Section):
    """What one request, and all at once, may take."""

    body_mb: int = Field(512, ge=1, le=65_536, description="largest body")
    unpacked_mb: int = Field(2048, ge=1, le=65_536, description="largest image, decoded, and largest zip, unpacked")
    files: int = Field(4096, ge=1, le=100_000, description="of one zip or multipart body")
    body_seconds: Duration = Field(120.0, description="for a body to arrive")
    waiting: int = Field(32, ge=1, le=10_000, description="predictions in one replica; the next is answered with 429")
    answer_seconds: Duration = Field(300.0, description="for an answer; after it, 503")


class BatchingConfig(Section):
    """How requests share a run of the network."""

    voxels: int = Field(2**22, ge=1, le=2**32, description="budget of one run, channels counted")
    wait_ms: float = Field(2.0, ge=0, le=10_000, description="for others, once a request waits")


class ReplicasConfig(Section):
    """Processes that answer. Those beyond ``least`` come and go with the load."""

    least: int = Field(1, ge=1, le=1024)
    most: int = Field(1, ge=1, le=1024)
    cpus: int | None = Field(None, ge=1, le=1024, description="of each, and its threads; null: an equal part of all")
    load: float = Field(
        4.0, gt=0, le=1000, description="requests and jobs at once in a replica, above which another is started"
    )
    up_seconds: Duration = Field(1.0, description="of such load, before another replica is started")
    down_seconds: Duration = Field(60.0, description="of less load, before one is stopped")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.least > self.most:
            raise ValueError(f"least={self.least} must be at most most={self.most}")
        return self


class SecurityConfig(Section):
    """Who may ask, and over what."""

    keys: str | None = Field(None, description="file of 'medray keys'; null: anyone who reaches the port")
    certificate: str | None = Field(None, description="PEM file of a TLS certificate")
    private_key: str | None = Field(None, description="PEM file of its key")
    requests_per_minute: int | None = Field(
        None, ge=1, le=1_000_000, description="of one key, where the key itself names no other limit; null: no limit"
    )

    @model_validator(mode="after")
    def _pair(self) -> SecurityConfig:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together: give both, or neither")
        return self


class ServeConfig(Section):
    """Everything that decides a server."""

    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback only with security.keys")
    port: int = Field(8000, ge=1, le=65_535)
    grpc_port: int | None = Field(
        None,
        ge=1,
        le=65_535,
        description="the Open Inference Protocol over gRPC, on the same host; null: not at all. On one machine only",
    )
    state: str = Field("runs/serve", description="folder of the audit trail, kept answers and metrics; private")
    models: dict[Name, ModelEntry] = Field(min_length=1, max_length=256)
    default: str | None = Field(None, description="the model of requests that name none; null: the only one")
    fast_proxy: bool = Field(True, description="HAProxy in front, where Ray has it; off with a certificate")
    kept_answers: Duration = Field(600.0, description="for how long an Idempotency-Key gets the same answer again")
    limits: LimitsConfig = LimitsConfig()
    batching: BatchingConfig = BatchingConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    security: SecurityConfig = SecurityConfig()

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if self.default is not None and self.default not in self.models:
            raise ValueError(f"default={self.default!r} is none of the models: {', '.join(self.models)}")
        if self.grpc_port == self.port:
            raise ValueError(f"grpc_port={self.grpc_port} is the port of HTTP; set another one")
        if self.security.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached from other machines, and security.keys is not set, so that anyone "
                "could ask. Make keys with 'medray keys add NAME --file keys.yaml', and set security.keys: keys.yaml"
            )
        return self

    @property
    def default_model(self) -> str | None:
        """The model of requests that name none; None where they have to."""
        return self.default or (next(iter(self.models)) if len(self.models) == 1 else None)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_serving(path: Path) -> ServeConfig:
    """Read a server's configuration; its relative paths come back absolute, from the file's own folder.

    Raises:
        ConfigError: the file is no such configuration; the message names the key and the rule.
    """
    return check_serving(read_yaml(path), source=str(path), folder=path.absolute().parent)


def check_serving(content: dict[str, Any], *, source: str, folder: Path) -> ServeConfig:
    """Validate a server's configuration and make its paths absolute.

    Raises:
        ConfigError: a key or value that the schema refuses.
    """
    try:
        config = ServeConfig.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in one['loc']) or 'file'}: {one['msg']}" for one in error.errors()[:5]]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None

    def absolute(value: str | None) -> str | None:
        return None if value is None else str(folder / Path(value).expanduser())

    models = {
        name: entry.model_copy(
            update={
                "versions": {
                    version: one.model_copy(update={"bundle": absolute(one.bundle)})
                    for version, one in entry.versions.items()
                }
            }
        )
        for name, entry in config.models.items()
    }
    security = config.security.model_copy(
        update={name: absolute(getattr(config.security, name)) for name in ("keys", "certificate", "private_key")}
    )
    return config.model_copy(update={"models": models, "security": security, "state": absolute(config.state)})
