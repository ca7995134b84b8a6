"""What a report shows. A workflow fills it; the report computes nothing but pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from medray.config.genotype import Genotype


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % confidence interval (NaN bounds where none could be had)."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An example image: (H, W) or (H, W, 3) uint8, ready to show."""

    pixels: npt.NDArray[np.uint8]
    caption: str


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    source: str
    task: str
    ndim: int
    modality: str
    classes: tuple[str, ...]
    cases: int
    patients: int
    sites: dict[str, int]
    splits: dict[str, int] = field(metadata={"unit": "cases"})
    shape: str
    spacing: str
    class_share: dict[str, float]
    findings: tuple[tuple[str, str, str], ...] = field(metadata={"columns": "severity, message, fix"})
    examples: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    number: int
    state: Literal["completed", "pruned", "failed", "running"]
    params: dict[str, object]
    values: dict[str, float]
    seconds: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class WarmRow:
    """A configuration that an earlier study found, tried right after the default.

    Attributes:
        origin: the study or data set.
        distance: between the two data sets' fingerprints; 0 for the same.
        there: by how much it beat the default there.
        here: the same here; None where the trial did not end.
    """

    trial: int
    origin: str
    distance: float
    there: float
    here: float | None


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """One thing that could have become the champion.

    Attributes:
        difference: to the best single network, paired, on the same validation cases; None for that one itself.
        latency_ms: of one case, the networks alone, one after another, as they ran here.
    """

    name: str
    validation: Interval
    chosen: bool
    difference: Interval | None = None
    latency_ms: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class Rivalry:
    """The champion against the best single network, on the cases that the gain was measured on.

    Attributes:
        single: its name.
        latency_ms: the single network's and the champion's.
    """

    single: str
    value: Interval
    difference: Interval
    latency_ms: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class TimeRow:
    """A part of a study's wall clock.

    Attributes:
        share: of all of it, 0..1.
    """

    name: str
    seconds: float
    share: float


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    name: str
    objective: str
    direction: Literal["max", "min"]
    budget: float
    spent: float
    time: tuple[TimeRow, ...]
    sampler: str
    pruner: str
    trials: tuple[TrialRow, ...]
    candidates: tuple[CandidateRow, ...]
    importance: dict[str, float]
    curves: dict[str, tuple[tuple[float, float], ...]] = field(metadata={"points": "seconds of training, objective"})
    rivalry: Rivalry | None = None
    warm: tuple[WarmRow, ...] = ()
    warm_note: str = ""


@dataclass(frozen=True, kw_only=True)
class ChoiceRow:
    """One candidate under the study's limits.

    Attributes:
        figures: what it came to, by name.
        kept: of each limit, whether it is kept.
        merit: points, the expression's value or the distance to the ideal, as text; empty for the metric alone.
        note: why it is not the champion, where a reason is known; how it was measured.
    """

    name: str
    chosen: bool
    refused: bool
    figures: dict[str, Interval]
    kept: dict[str, bool]
    merit: str
    note: str


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A completed trial, or the champion, in the picture of two objectives."""

    name: str
    x: float
    y: float
    on_front: bool
    feasible: bool
    champion: bool = False


@dataclass(frozen=True, kw_only=True)
class SelectionSummary:
    """How the champion was chosen, where the metric alone did not decide.

    Attributes:
        remark: for the headline: limits that are kept or broken.
        limits: by name.
        axes: names of the two objectives of the picture; empty without one.
        hypervolume: seconds of search to the share of the objectives' box that the trials until then dominate.
    """

    rule: str
    why: str
    remark: str
    measured: tuple[str, ...]
    limits: dict[str, float]
    rows: tuple[ChoiceRow, ...]
    axes: tuple[str, ...] = ()
    points: tuple[FrontPoint, ...] = ()
    directions: tuple[Literal["max", "min"], ...] = ()
    hypervolume: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Champion against trial 0 retrained with the same budget."""

    metric: str
    default: Interval
    champion: Interval
    difference: Interval
    measured_on: Literal["test", "validation"]
    cases: int
    patients: int

    @property
    def optimistic(self) -> bool:
        """Whether the cases were used for a choice before."""
        return self.measured_on == "validation"


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    site: str
    cases: int
    score: Interval


@dataclass(frozen=True, kw_only=True)
class RobustnessRow:
    corruption: str
    severity: int
    score: Interval


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a ROC, PR or reliability plot."""

    name: str
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    area: float


@dataclass(frozen=True, kw_only=True)
class ClassificationResults:
    confusion: npt.NDArray[np.int64] | None = field(
        metadata={"shape": "(K, K): rows true, columns predicted; None but where a case has one class"}
    )
    roc: tuple[Curve, ...]
    pr: tuple[Curve, ...]
    reliability: tuple[Curve, ...] = field(metadata={"lines": "before and after temperature scaling"})
    ece: tuple[float, float] = field(metadata={"order": "before, after"})
    temperature: float


@dataclass(frozen=True, kw_only=True)
class SegmentationCase:
    case: str
    patient: str
    site: str
    dice: tuple[float, ...] = field(metadata={"per": "foreground class; NaN where absent in both"})
    hd95: tuple[float, ...] = field(metadata={"unit": "mm, or pixels without spacing"})


@dataclass(frozen=True, kw_only=True)
class SegmentationResults:
    cases: tuple[SegmentationCase, ...]
    overlays: tuple[Picture, ...] = field(metadata={"order": "best, median, worst"})
    per_class: dict[str, Interval]
    hd95_unit: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What an architecture search found; ``chosen``: the champion has it."""

    strategy: str
    steps: int
    seconds: float
    genotype: Genotype
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class ReportData:
    headline: str
    intended_use: str
    created: str
    data: DataSummary
    study: StudySummary
    gain: Gain
    metrics: dict[str, Interval]
    sites: tuple[SiteRow, ...]
    robustness: tuple[RobustnessRow, ...]
    classification: ClassificationResults | None
    segmentation: SegmentationResults | None
    resources: dict[str, str] = field(
        metadata={"rows": "training time, peak memory, inference time a case, bundle size…"}
    )
    reproduce: dict[str, str] = field(metadata={"blocks": "title to text: command, experiment.yaml, versions, machine"})
    selection: SelectionSummary | None = None
    architecture: Architecture | None = None
