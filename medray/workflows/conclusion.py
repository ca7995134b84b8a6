"""The study's last stage: choose the champion, measure it, write the bundle, fill the report."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medray import __version__
from medray.bundle.spec import INTENDED_USE
from medray.data.image import Image
from medray.learn.corrupt import CORRUPTIONS, Corruption, corrupt
from medray.learn.intervals import Interval as Estimate
from medray.learn.intervals import bootstrap
from medray.report.data import (
    Architecture,
    CandidateRow,
    Gain,
    Interval,
    ReportData,
    Rivalry,
    RobustnessRow,
    SiteRow,
    StudySummary,
    TimeRow,
    TrialRow,
    WarmRow,
)
from medray.report.render import write_report
from medray.search.trial import TrialRecord
from medray.workflows import champion as choosing
from medray.workflows.account import account
from medray.workflows.champion import Candidate, Scores
from medray.workflows.contest import Conclusion, Contest, hold_contest, robustness_extent
from medray.workflows.judging import spread
from medray.workflows.packing import write_champion
from medray.workflows.planning import dump
from medray.workflows.recipe import Recipe
from medray.workflows.results import classification_results, data_summary, segmentation_results
from medray.workflows.selection_results import plain, selection_summary

DRAWS = 500
"""Of the bootstrap of each candidate; there may be a dozen, and some metrics take milliseconds a draw."""


@dataclass(frozen=True, kw_only=True)
class Concluded:
    """Who won, and by how much.

    Attributes:
        metrics: of the champion, on the cases that ``gain`` names: value and 95 % limits.
        selection: of a study with limits, another rule than the metric alone, or several objectives: how it was chosen.
        time: seconds that each part of the study took, until the report was written.
    """

    champion: str
    headline: str
    gain: Gain
    metrics: dict[str, tuple[float, float, float]]
    selection: Mapping[str, Any] | None = None
    time: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: Path, *, seconds: float) -> None:
        """``result.json``, for programs: null where there is no figure. Its presence says that the study has ended."""
        summary = {
            "champion": self.champion,
            "headline": self.headline,
            "measured_on": self.gain.measured_on,
            "cases": self.gain.cases,
            "metric": self.gain.metric,
            "default": _numbers(astuple(self.gain.default)),
            "difference": _numbers(astuple(self.gain.difference)),
            "metrics": {name: _numbers(figures) for name, figures in self.metrics.items()},
            "seconds": seconds,
            "time": {name: round(took, 1) for name, took in self.time.items()},
            **({} if self.selection is None else {"selection": self.selection}),
        }
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")
        partial.replace(path)


def _numbers(figures: tuple[float, ...]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in figures]


def conclude(asked: Conclusion) -> Concluded:
    """Choose on validation cases, measure on test cases, write ``bundle/``, ``report.html`` and ``leaderboard.csv``."""
    recipe, directory = asked.recipe, asked.directory
    metric = asked.objective[0].removeprefix("val/")
    splits = recipe.splits(asked.finalists[0][1].experiment)
    contest = hold_contest(asked, splits, metric)
    candidates, on_validation, winner = contest.candidates, contest.scores, contest.winner
    crowning = contest.crowning
    champion, default, single = contest.named(winner), candidates[0], contest.named(contest.single)

    pair = list({candidate.name: candidate for candidate in (champion, default, single)}.values())
    indices, began = splits.test or splits.val, time.monotonic()
    measured = _measured(recipe, pair, indices, metric, on_validation)
    case_seconds = (time.monotonic() - began) / max(1, len(indices))
    best, base = measured[champion.name], measured[default.name]
    temperature = best.temperature
    gain = _gain(metric, best, base, measured_on="test" if splits.test else "validation")
    metrics = best.intervals()
    headline = _headline(champion.name, metric, gain, rivals=len(candidates) > 1 or len(asked.records) > 1)
    summary = None if crowning is None else selection_summary(crowning, asked.chooser, asked.objective, asked.records)
    if summary is not None:
        headline += summary.remark
    notes = () if summary is None else (summary.why,)
    bundle_seconds = _write_bundle(asked, champion, temperature, on_validation[winner], metrics, notes)
    robustness = _robustness(asked, champion, indices, metric, case_seconds, temperature)
    classification = segmentation = None
    if best.task.dense:
        segmentation = segmentation_results(recipe, champion, best)
    else:
        classification = classification_results(recipe, best, temperature)
    _leaderboard(directory / "leaderboard.csv", asked)
    time_rows = account(asked.clock.booked, asked.clock.spent, asked.records, asked.slots)
    data = ReportData(
        headline=headline,
        intended_use=INTENDED_USE,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        data=data_summary(recipe, asked.source, splits),
        study=_study_summary(asked, contest, measured, time_rows),
        gain=gain,
        metrics={name: _interval(found) for name, found in metrics.items()},
        sites=_sites(recipe, best),
        robustness=robustness,
        classification=classification,
        segmentation=segmentation,
        resources=_resources(asked, champion, case_seconds, bundle_seconds),
        reproduce=_reproduce(asked),
        selection=summary,
        architecture=_architecture(asked, champion),
    )
    write_report(data, directory / "report.html")
    return Concluded(
        champion=winner,
        headline=headline,
        gain=gain,
        metrics={name: (found.value, found.low, found.high) for name, found in metrics.items()},
        selection=None if crowning is None else plain(crowning, asked.chooser),
        time={row.name: row.seconds for row in time_rows},
    )


def _measured(
    recipe: Recipe,
    candidates: Sequence[Candidate],
    indices: tuple[int, ...],
    metric: str,
    on_validation: Mapping[str, Scores],
) -> dict[str, Scores]:
    """What candidates do on cases, each at the temperature that its bundle has, or would have."""
    scores = choosing.score(recipe, candidates, indices, metric=metric, distances=True)
    return {
        name: replace(found, temperature=choosing.temperature_of(on_validation[name])) for name, found in scores.items()
    }


def _interval(found: Estimate) -> Interval:
    return Interval(value=found.value, low=found.low, high=found.high)


def _gain(metric: str, best: Scores, base: Scores, *, measured_on: Any) -> Gain:
    return Gain(
        metric=metric,
        default=_interval(base.interval()),
        champion=_interval(best.interval()),
        difference=_interval(choosing.difference(best, base)),
        measured_on=measured_on,
        cases=len(best.indices),
        patients=len(set(best.groups.tolist())),
    )


def _headline(name: str, metric: str, gain: Gain, *, rivals: bool = True) -> str:
    got, more = gain.champion, gain.difference
    where = "test" if not gain.optimistic else "validation (optimistic: these cases chose the champion)"
    text = f"{name}: {metric} {got.value:.3f} (95 % CI {got.low:.3f} to {got.high:.3f}) on {gain.cases} {where} cases"
    if not rivals:  # nothing was searched, so nothing may be said of a search
        return f"{text}; the plan's own default, no other trial was run"
    if name == "default":
        return f"{text}; the search found nothing better than the plan's own default"
    return f"{text}; {more.value:+.3f} ({more.low:+.3f} to {more.high:+.3f}) over the plan's default"


def _write_bundle(
    asked: Conclusion,
    champion: Candidate,
    temperature: float,
    validation: Scores,
    metrics: Mapping[str, Estimate],
    notes: Sequence[str],
) -> float:
    return write_champion(
        asked.directory / "bundle",
        asked.recipe,
        champion,
        validation,
        name=asked.study.name,
        temperature=temperature,
        metrics=metrics,
        notes=[f"Trained by: {asked.command}", f"Champion: {champion.name}", *notes],
    )


def _robustness(
    asked: Conclusion,
    champion: Candidate,
    indices: tuple[int, ...],
    metric: str,
    case_seconds: float,
    temperature: float,
) -> tuple[RobustnessRow, ...]:
    """The champion on corrupted images, at its bundle's temperature."""
    manifest = asked.recipe.manifest
    if manifest.columns:
        return ()  # rows of a table have no blur and no scanner
    levels, cases = robustness_extent(asked.study.budget, manifest.task, case_seconds)
    chosen = spread(indices, cases)
    rows = []
    plan: list[tuple[str, int, Any]] = [("none", 0, None)]
    plan += [(name, level, _corruption(name, level)) for name in CORRUPTIONS for level in levels]
    for name, level, change in plan:
        found = choosing.score(asked.recipe, [champion], chosen, metric=metric, corrupt=change)[champion.name]
        score = replace(found, temperature=temperature).interval()
        rows.append(RobustnessRow(corruption=name, severity=level, score=_interval(score)))
    return tuple(rows)


def _corruption(name: Corruption, severity: int) -> Any:
    def change(image: Image) -> Image:
        array = corrupt(torch.from_numpy(np.array(image.array)), name, severity, seed=0).numpy()
        return replace(image, array=array)

    return change


def _architecture(asked: Conclusion, champion: Candidate) -> Architecture | None:
    if asked.found is None:
        return None
    best = asked.found.genotypes[0]
    return Architecture(
        strategy=str(asked.study.nas.strategy),
        steps=asked.found.steps,
        seconds=asked.found.seconds,
        genotype=best,
        chosen=any(member.experiment.model.name == best.name for member in champion.members),
    )


def _sites(recipe: Recipe, scores: Scores) -> tuple[SiteRow, ...]:
    sites = np.asarray([recipe.manifest.cases[index].site or "" for index in scores.indices])
    names = sorted(set(sites.tolist()) - {""})
    if len(names) < 2:
        return ()
    rows = []
    for name in names:
        chosen = np.flatnonzero(sites == name)
        arrays = tuple(array[chosen] for array in scores.arrays)
        found = bootstrap(arrays, scores.statistic, groups=scores.groups[chosen], n=500)
        rows.append(SiteRow(site=name, cases=len(chosen), score=_interval(found)))
    return tuple(rows)


def _study_summary(
    asked: Conclusion, contest: Contest, measured: Mapping[str, Scores], time_rows: tuple[TimeRow, ...]
) -> StudySummary:
    name, direction = asked.objective
    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    for label, trained in asked.finalists:
        points = [(row.get("seconds"), row.get(name)) for row in trained.fit.history]
        curves[f"final: {label}"] = tuple((float(x), float(y)) for x, y in points if x is not None and y is not None)
    for record in asked.records:
        points = [(row.get("seconds"), (row.get("metrics") or {}).get(name)) for row in record.history]
        line = tuple((float(x), float(y)) for x, y in points if x is not None and y is not None)
        if line:
            curves[f"trial {record.number}"] = line
    return StudySummary(
        name=asked.study.name,
        objective=name,
        direction=direction,
        budget=asked.study.budget,
        spent=asked.clock.spent,
        time=time_rows,
        sampler=asked.sampler,
        pruner=asked.study.pruner,
        trials=tuple(_trial_row(record) for record in asked.records),
        candidates=tuple(_candidate_row(contest, candidate) for candidate in contest.candidates),
        rivalry=_rivalry(contest, measured),
        warm=_warm_rows(asked),
        warm_note=_warm_note(asked),
        importance=dict(asked.importance),
        curves=curves,
    )


def _candidate_row(contest: Contest, candidate: Candidate) -> CandidateRow:
    found, best = contest.scores[candidate.name], contest.scores[contest.single]
    return CandidateRow(
        name=candidate.name,
        validation=_interval(found.interval(n=DRAWS)),
        chosen=candidate.name == contest.winner,
        difference=None if candidate.name == contest.single else _interval(choosing.difference(found, best, n=DRAWS)),
        latency_ms=contest.latency_ms(candidate),
    )


def _rivalry(contest: Contest, measured: Mapping[str, Scores]) -> Rivalry | None:
    """None where the champion is the best single network."""
    if contest.winner == contest.single:
        return None
    single = measured[contest.single]
    return Rivalry(
        single=contest.single,
        value=_interval(single.interval()),
        difference=_interval(choosing.difference(measured[contest.winner], single)),
        latency_ms=(
            contest.latency_ms(contest.named(contest.single)),
            contest.latency_ms(contest.named(contest.winner)),
        ),
    )


def _warm_rows(asked: Conclusion) -> tuple[WarmRow, ...]:
    name, direction = asked.objective
    sign = 1.0 if direction == "max" else -1.0
    ended = {record.number: sign * record.metrics[name] for record in asked.records if record.values is not None}
    rows = []
    for record in asked.records:
        if record.proposal is not None:
            here = ended[record.number] - ended[0] if record.number in ended and 0 in ended else None
            found = record.proposal
            rows.append(
                WarmRow(trial=record.number, origin=found.origin, distance=found.distance, there=found.gain, here=here)
            )
    return tuple(rows)


def _warm_note(asked: Conclusion) -> str:
    """Why nothing was tried early."""
    if not asked.study.warm_start:
        return "Off: study.warm_start=false."
    if not asked.records:
        return "There was no search."
    return (
        "No earlier study of data near enough found something that this space holds and the default is not; or the "
        "default itself lies outside the space."
    )


def _trial_row(record: TrialRecord) -> TrialRow:
    notes = ["the plan's default"] if record.is_default else []
    if record.stopped == "refused":
        notes.append(f"not trained: breaks {', '.join(record.extras.get('refused', ()))}")
    if record.error:
        notes = [record.error.strip().splitlines()[-1][:300]]
    if record.proposal is not None:
        notes.append(f"from {record.proposal.origin}")
    notes += [f"lost on {host}, run again" for host in record.losses]
    return TrialRow(
        number=record.number,
        state=record.state,
        params=dict(record.params),
        values=dict(record.metrics),
        seconds=record.seconds,
        note="; ".join(notes),
    )


def _resources(asked: Conclusion, champion: Candidate, case_seconds: float, bundle_seconds: float) -> dict[str, str]:
    files = sum(path.stat().st_size for path in (asked.directory / "bundle").rglob("*") if path.is_file())
    weights = sum(p.numel() for member in champion.members for p in member.model.parameters())
    return {
        "Wall clock": f"{asked.clock.spent:.0f} s of {asked.study.budget:.0f} s",
        "Training of the finalists": f"{sum(t.fit.seconds for _, t in asked.finalists):.0f} s, "
        f"{sum(t.fit.steps for _, t in asked.finalists)} steps",
        "Peak memory of training": f"{max(t.fit.peak_memory_mb for _, t in asked.finalists):.0f} MiB",
        "Parameters": f"{weights:,}",
        "Measuring one case, reading included": f"{case_seconds * 1000:.0f} ms",
        "Bundle": f"{files / 2**20:.1f} MiB, written and verified in {bundle_seconds:.0f} s",
        "Machine": asked.recipe.machine.note,
        **_losses(asked.records),
    }


def _losses(records: Sequence[TrialRecord]) -> dict[str, str]:
    """What was lost with processes and machines, and run again; nothing where nothing was."""
    lost = [f"trial {record.number} on {host}" for record in records for host in record.losses]
    return {"Lost and run again": f"{len(lost)}: {', '.join(lost)}"} if lost else {}


def _reproduce(asked: Conclusion) -> dict[str, str]:
    libraries = ("torch", "ray", "optuna", "monai", "timm", "onnxruntime-gpu", "numpy")
    versions = [f"medray {__version__}", f"python {platform.python_version()}", platform.platform()]
    for library in libraries:
        try:
            versions.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            continue
    return {
        "Command": asked.command,
        **{f"experiment.yaml of {name}": dump(trained.experiment) for name, trained in asked.finalists},
        "Data digest": asked.recipe.fingerprint.digest,
        "Versions": "\n".join(versions),
    }


def _leaderboard(path: Path, asked: Conclusion) -> None:
    """Trials, best first; the first row is the best of the search."""
    name, direction = asked.objective
    sign = -1.0 if direction == "max" else 1.0
    ended = {"completed": 0, "pruned": 1, "failed": 2, "running": 3}

    def place(record: TrialRecord) -> tuple[int, float]:
        value = record.metrics.get(name, np.nan)
        return ended[record.state], sign * value if np.isfinite(value) else np.inf

    rows = sorted(asked.records, key=place)
    keys = sorted({key for record in rows for key in record.params})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", name, "seconds", *keys])
        for record in rows:
            value = record.metrics.get(name, "")
            writer.writerow(
                [
                    record.number,
                    record.state,
                    value,
                    f"{record.seconds:.1f}",
                    *(record.params.get(key, "") for key in keys),
                ]
            )
