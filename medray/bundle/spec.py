"""BundleSpec: what ``bundle.json`` says. It is read from strangers, so every field is bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from medray.config.schema import ModelConfig, PreprocessConfig
from medray.data.image import Modality
from medray.errors import BundleError
from medray.tasks.catalogue import TaskKind, find_task
from medray.tasks.task import Task

INTENDED_USE = "Research use only. Not a medical device."
MANIFEST_NAME = "bundle.json"
MAX_SPEC_BYTES = 8 << 20
MAX_FILE_BYTES = 16 << 30

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,3}")


def _inside(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"file name {name!r} must be a plain relative path of letters, digits, '.', '_' and '-'")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
Text = Annotated[str, Field(max_length=20_000)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Layer = Annotated[str, Field(min_length=1, max_length=300)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FileEntry(_Part):
    """One file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class InferenceSpec(_Part):
    """How the network is applied to a prepared image."""

    patch_size: tuple[Size, ...] | None = Field(None, description="sliding window; null: the image as a whole")
    divisor: Size = Field(1, description="each axis of a whole image is padded to a multiple of this")
    overlap: float = Field(0.5, ge=0.0, lt=1.0)
    batch_size: int = Field(1, ge=1, le=4096)
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = Field((), max_length=3, description="mirror averaging")
    keep_largest: bool = False


class BundleSpec(_Part):
    """Everything that a program needs to turn an image into an answer, but the weights."""

    version: Literal[1] = 1
    name: str = Field("bundle", min_length=1, max_length=200)
    kind: TaskKind
    ndim: Literal[2, 3]
    channels: int = Field(ge=1, le=1024)
    classes: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(min_length=1, max_length=4096)
    modality: Modality = "other"
    preprocess: PreprocessConfig
    inference: InferenceSpec = InferenceSpec()
    temperature: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False, description="divides the logits")
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        None, description="one a label, where there are several"
    )
    members: tuple[ModelConfig, ...] = Field(
        min_length=1, max_length=64, description="an ensemble averages their probabilities"
    )
    weights: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, description="of the members in that average, of sum 1; null: all alike"
    )
    vote: bool = Field(False, description="the members' decisions are averaged, not their probabilities")
    files: dict[Inside, FileEntry] = Field(max_length=256)
    metrics: dict[str, float | None] = Field(default_factory=dict, max_length=1000)
    versions: dict[str, str] = Field(default_factory=dict, max_length=100)
    precision: Literal["fp32", "int8"] = Field(
        "fp32", description="of the ONNX file; int8: the torch twin only explains"
    )
    pruned: dict[Layer, tuple[Size, Size, Size]] | None = Field(
        None, max_length=20_000, description="inputs, outputs and groups of layers that were cut (one member only)"
    )
    history: tuple[Text, ...] = Field((), max_length=64, description="how it was compressed, a sentence a step")
    golden: Literal["data", "synthetic"] = Field("synthetic", description="where the golden inputs come from")
    intended_use: Text = INTENDED_USE
    created: str = Field("", max_length=64, description="ISO 8601, UTC")

    @model_validator(mode="after")
    def _consistent(self) -> BundleSpec:
        patch, size, spacing = self.inference.patch_size, self.preprocess.size, self.preprocess.spacing
        for name, value in (
            ("inference.patch_size", patch),
            ("preprocess.size", size),
            ("preprocess.spacing", spacing),
        ):
            if value is not None and len(value) != self.ndim:
                raise ValueError(f"{name} has {len(value)} numbers for {self.ndim} spatial axes")
        if any(axis >= self.ndim for axis in self.inference.flip_axes):
            raise ValueError(f"inference.flip_axes {self.inference.flip_axes} must be below ndim={self.ndim}")
        task = self.task
        if (self.thresholds is not None) and (not task.thresholds or len(self.thresholds) != len(self.classes)):
            raise ValueError("thresholds belong to bundles of several labels, one for each")
        if self.weights is not None and (
            len(self.weights) != len(self.members) or abs(sum(self.weights) - 1) > 1e-3 or self.vote
        ):
            raise ValueError("weights belong to averages: one for each member, of sum 1")
        if self.vote and task.dense:
            raise ValueError("a segmentation is put together from windows, of which each would vote apart")
        if self.pruned is not None and len(self.members) != 1:
            raise ValueError("a pruned bundle has one member")
        if task.dense and len(self.classes) > 255:
            raise ValueError(f"{len(self.classes)} classes; a label map holds at most 255 (255 itself means ignore)")
        if len(self.classes) < task.fewest_classes:
            raise ValueError(
                f"{self.kind} needs at least {task.fewest_classes} classes, background counted; there is "
                f"{len(self.classes)}"
            )
        return self

    @property
    def task(self) -> Task:
        """What the bundle answers."""
        return find_task(self.kind)

    @property
    def outputs(self) -> int:
        """Channels of the logits."""
        return self.task.outputs(len(self.classes))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """One safetensors file for each member."""
        return tuple(f"weights/member-{index}.safetensors" for index in range(len(self.members)))

    @classmethod
    def load(cls, directory: Path) -> BundleSpec:
        """Read ``bundle.json``.

        Raises:
            BundleError: missing, too large, no JSON, or against the schema.
        """
        path = directory / MANIFEST_NAME
        try:
            size = path.stat().st_size
            if size > MAX_SPEC_BYTES:
                raise BundleError(
                    f"{path}: {size} bytes; a bundle.json has at most {MAX_SPEC_BYTES}. This is no medray bundle"
                )
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise BundleError(
                f"{path}: {error.strerror or error}. Give the folder that holds bundle.json, such as runs/NAME/bundle"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise BundleError(f"{path}: no JSON ({error}). Write the bundle anew with: medray export") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "bundle"
            raise BundleError(f"{path}: {where}: {first['msg']}. Write the bundle anew with: medray export") from None
