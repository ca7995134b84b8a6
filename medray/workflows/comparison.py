"""Two studies side by side: what each tried and found, and how their champions differ on the same cases."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.config.compose import build_experiment, compose
from medray.config.schema import SplitConfig
from medray.data.fingerprint import Fingerprint
from medray.data.manifest import Manifest
from medray.data.splits import make_splits
from medray.errors import StudyError
from medray.learn.intervals import Interval
from medray.workflows.asked import resumed
from medray.workflows.evaluation import Progress, evaluate

__all__ = ["Compared", "StudyFacts", "compare_studies"]


@dataclass(frozen=True, kw_only=True)
class StudyFacts:
    """What one ended study came to.

    Attributes:
        leaderboard: its trials, best first: the rows of ``leaderboard.csv``.
        settings: what was asked for, for a table: space, budget, sampler and so on.
        why: of a study with limits or another rule: why the champion is the champion.
    """

    name: str
    directory: Path
    champion: str
    headline: str
    metric: str
    value: Interval
    seconds: float
    settings: Mapping[str, str]
    leaderboard: tuple[Mapping[str, str], ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two studies.

    Attributes:
        difference: first champion minus second, by figure, paired by patient on the same held-back cases; None where
            there are no such cases.
        reason: why there is none, or on how many cases it was measured.
    """

    studies: tuple[StudyFacts, StudyFacts]
    difference: Mapping[str, Interval] | None
    reason: str


def compare_studies(one: Path, other: Path, *, progress: Progress | None = None) -> Compared:
    """Put two ended studies side by side.

    The champions are compared case by case where both studies saw the same images (by the fingerprint's digest of
    pixels and labels) and split them alike. Both bundles answer through ONNX Runtime, or torch where one has no ONNX
    file.

    Raises:
        StudyError: a folder that holds no study, or one that has not ended.
    """
    facts = (_facts(Path(one)), _facts(Path(other)))
    first, second = (found.directory for found in facts)
    digests = [Fingerprint.load(folder / "fingerprint.json").digest for folder in (first, second)]
    splits = [_split(folder) for folder in (first, second)]
    if digests[0] != digests[1]:
        return Compared(studies=facts, difference=None, reason="no paired difference: they saw different images")
    if splits[0] != splits[1]:
        return Compared(studies=facts, difference=None, reason="no paired difference: they split the cases differently")
    manifest = Manifest.load(first / "manifest.json")
    found = make_splits(manifest, splits[0], splits[0].seed)
    cases = found.test or found.val
    has_onnx = all((folder / "bundle" / "model.onnx").is_file() for folder in (first, second))
    measured = evaluate(
        first / "bundle",
        manifest,
        runtime="onnx" if has_onnx else "torch",
        compare=second / "bundle",
        cases=cases,
        progress=progress,
    )
    assert measured.comparison is not None
    kind = "test" if found.test else "validation"
    reason = f"on the same {measured.cases} {kind} cases of {measured.patients} patients, paired by patient"
    if not found.test:
        reason += "; optimistic for both: these cases chose the champions"
    return Compared(studies=facts, difference=measured.comparison.difference, reason=reason)


def _facts(directory: Path) -> StudyFacts:
    _, asked = resumed(directory, [])
    try:
        result: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        with (directory / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
            leaderboard = tuple(csv.DictReader(file))
        metric = str(result["metric"])
        value = Interval(*(float("nan") if number is None else float(number) for number in result["metrics"][metric]))
        study = asked.study
        return StudyFacts(
            name=study.name,
            directory=directory,
            champion=str(result["champion"]),
            headline=str(result["headline"]),
            metric=metric,
            value=value,
            seconds=float(result["seconds"]),
            settings={
                "data": asked.source,
                "budget": f"{study.budget:.0f} s",
                "objectives": ", ".join(f"{name} {way}" for name, way in study.objectives.items()) or metric,
                "sampler, pruner": f"{study.sampler}, {study.pruner}",
                "space": ", ".join(asked.space) or "none",
            },
            leaderboard=leaderboard,
            why=str((result.get("selection") or {}).get("why", "")),
        )
    except FileNotFoundError as error:
        raise StudyError(
            f"{directory} has not ended ({error.filename} is not there). Go on with it: "
            f"medray tune --resume {directory}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{directory / 'result.json'} can't be read ({error!r}); it is not what a study wrote"
        ) from None


def _split(directory: Path) -> SplitConfig:
    """How a study dealt the cases out: trials may not vary it, so the default's experiment says it for all."""
    return build_experiment(compose(directory / "experiment.yaml").explicit).split
