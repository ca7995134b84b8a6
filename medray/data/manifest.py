"""Case and Manifest: what the data are and where they lie."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medray.data.document import Document
from medray.data.image import Modality
from medray.learn.losses import IGNORE
from medray.tasks.catalogue import TaskKind

__all__ = ["IGNORE", "Case", "Finding", "Manifest", "Split"]

Split = Literal["train", "val", "test"]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Case(_Row):
    """One sample.

    ``images`` and ``mask`` are references: a path relative to ``Manifest.root`` (or absolute), a directory for a DICOM
    series, ``file.npz#array/index`` for one item of an archive, or ``phantom://name?seed=…&index=…``.
    """

    id: str = Field(min_length=1)
    images: tuple[str, ...] = Field(min_length=1)
    label: int | tuple[int, ...] | None = Field(None, description="class index; 0/1 per label where there are several")
    mask: str | None = None
    valid: str | None = Field(None, description="region of interest: where it is 0, pixels are ignored")
    patient: str = ""
    site: str | None = None
    split: Split | None = None
    columns: dict[str, str | float | None] = Field(default_factory=dict, description="clinical columns")

    @property
    def group(self) -> str:
        """What may not be torn apart by a split: the patient, or the case itself where none is known."""
        return self.patient or self.id


class Finding(_Row):
    """One thing that a check found."""

    rule: str = Field(description="e.g. unreadable, empty, constant, geometry, label-range, duplicate, leak, spacing")
    severity: Literal["warning", "error"]
    case: str | None
    message: str = Field(description="what is wrong, with the value")
    fix: str = Field(description="what to do")


class Manifest(_Row, Document):
    """The cases of a data set, and where they came from."""

    version: Literal[1] = 1
    source: str
    root: str
    task: TaskKind
    ndim: Literal[2, 3]
    channels: int = Field(ge=1)
    classes: tuple[str, ...] = Field(description="of masks: background first")
    modality: Modality = "other"
    columns: tuple[str, ...] = Field((), description="of a table's rows: what the channels are, see medray.data.rows")
    cases: tuple[Case, ...]
    findings: tuple[Finding, ...] = ()
