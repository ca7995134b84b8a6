"""Make a bundle smaller and faster, each step behind a gate: ``medray compress``.

distil, prune channels, prune weights, quantise: each takes what the former kept. A step is kept where the metrics fall
by no more than ``max_drop`` on validation cases (never test ones) and the runtime that will serve is faster by it (or,
where that is what the step is for, the file packs smaller and the runtime no slower); else it is undone and reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medray.bundle.engines import ONNX_NAME, race, torch_threads
from medray.bundle.read import Bundle
from medray.bundle.write import derive
from medray.errors import CompressionError, MedrayError
from medray.workflows import compress_steps as making
from medray.workflows.champion import difference
from medray.workflows.compress_steps import CompressOptions, Make, State, recipe_of
from medray.workflows.gate import Aim, Verdict, judge, score_bundle
from medray.workflows.recipe import Recipe

__all__ = ["CompressOptions", "CompressReport", "Step", "compress"]

Note = Callable[[str], None]
"""Told what is being done, a sentence at a time."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step that was tried.

    Attributes:
        name: such as ``prune 0.5``.
        kept: whether the result is built on it.
        reason: why it was undone; empty where it was kept.
        verdict: what the gate measured; None where the step failed before it.
        facts: multiplications, parameters, shares of zeros before and after, cases looked at, seconds of training.
        compared: with another way to the same end, on the same cases.
    """

    name: str
    kept: bool
    reason: str = ""
    verdict: Verdict | None = None
    facts: dict[str, float] = field(default_factory=dict)
    compared: str = ""

    @property
    def sentence(self) -> str:
        """For the card."""
        measured = f": {self.verdict.shown}" if self.verdict else ""
        compared = f"; {self.compared}" if self.compared else ""
        return f"{self.name}{measured}{compared}" + ("" if self.kept else f"; undone: {self.reason}")


@dataclass(frozen=True, kw_only=True)
class CompressReport:
    """All steps; ``exit_code`` is 1 where none was kept and so no bundle written."""

    source: Path
    bundle: Path | None
    validation_cases: int
    steps: tuple[Step, ...]

    @property
    def exit_code(self) -> int:
        """For the shell."""
        return 0 if self.bundle is not None else 1


def compress(
    bundle_dir: Path | str,
    options: CompressOptions,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    note: Note = lambda _: None,
) -> CompressReport:
    """Compress a bundle into ``out``; what it was made from is left as it is.

    Beside ``out``, ``OUT-work`` holds the data's manifest, trainings and ``report.json``.

    Args:
        bundle_dir: the bundle.
        options: what to try.
        overrides: ``data=...`` where the data lie elsewhere than when it was trained; ``train.budget=5min``,
            ``optim.lr=...`` and such for fine-tuning and the student's training.
        out: folder of the new bundle.
        note: hears of progress.

    Raises:
        CompressionError: nothing was asked for, or the bundle can't be compressed.
        DataError: the data aren't there, or aren't the bundle's.
    """
    source = Bundle.open(bundle_dir)
    _check(source, options, out)
    work = out.with_name(f"{out.name}-work")
    note("checking the data")
    recipe, experiment = recipe_of(source, overrides, work)
    validation = recipe.splits(experiment).val
    note(f"measuring {source.spec.name} on {len(validation)} validation cases")
    scores = score_bundle(source, _engine(source, options), recipe, validation)
    state = State(bundle=source, experiment=experiment, scores=scores)
    steps: list[Step] = []
    for ways in _asked(options, state, recipe, overrides):
        tried = []
        for name, make, aim in ways:
            note(name)
            folder = work / name.replace(" ", "-").replace(":", "-")
            tried.append(_try(name, make, aim, state, recipe, options, validation, folder))
        settled, after = _settle(tried)
        if after is not None:
            state.bundle, state.experiment, state.scores = after.bundle, after.experiment, after.scores
        for step in settled:
            note(step.sentence)
        steps.extend(settled)
    kept = state.bundle is not source
    if kept:
        derive(state.bundle, out, history=[f"From bundle {source.spec.name!r} by:", *(s.sentence for s in steps)])
    report = CompressReport(
        source=source.directory, bundle=out if kept else None, validation_cases=len(validation), steps=tuple(steps)
    )
    (work / "report.json").write_text(json.dumps(asdict(report), indent=1, default=str), encoding="utf-8")
    return report


def _asked(
    options: CompressOptions, state: State, recipe: Recipe, overrides: Sequence[str]
) -> list[list[tuple[str, Make, Aim]]]:
    """The steps, in order; where one has several ways to its end, at most one of them is kept."""
    found: list[list[tuple[str, Make, Aim]]] = []
    if options.distill:
        name = f"distill {options.distill}"
        found.append([(name, lambda at: making.distilled(state, recipe, overrides, options, at), "speed")])
    if options.prune is not None:
        ratio = options.prune
        found.append([(f"prune {ratio:g}", lambda at: making.pruned(state, recipe, ratio, at), "speed")])
    if options.sparsity is not None:
        share = options.sparsity
        found.append([(f"sparsity {share:g}", lambda at: making.sparse(state, recipe, share, at), "size")])
    if options.quantize:
        name = f"quantize {options.quantize}"
        found.append([(name, lambda at: making.quantized(state, recipe, options, at), "speed")])
    if options.qat:
        found[-1].append((f"{name} qat", lambda at: making.rehearsed(state, recipe, options, at), "speed"))
    return found


def _check(source: Bundle, options: CompressOptions, out: Path) -> None:
    if not (options.quantize or options.prune is not None or options.sparsity is not None or options.distill):
        raise CompressionError(
            "nothing to do: give --quantize int8, --prune 0.5, --sparsity 0.8, --distill NAME, or several of them"
        )
    if options.qat and options.quantize != "int8":
        raise CompressionError("--qat: trains for int8. Give --quantize int8 with it")
    if source.spec.precision == "int8":
        raise CompressionError(f"{source.directory}: is int8 already. Compress the bundle that it was made from")
    if options.max_drop < 0 or not math.isfinite(options.max_drop) or options.calibration < 1:
        raise CompressionError(
            f"--max-drop {options.max_drop} must be at least 0, and --calibration {options.calibration} at least 1"
        )
    if options.prune is not None and not 0 < options.prune < 1:
        raise CompressionError(f"--prune {options.prune}: the share of channels to take away lies between 0 and 1")
    if options.sparsity is not None and not 0 < options.sparsity < 1:
        raise CompressionError(f"--sparsity {options.sparsity}: the share of weights to become zero lies in (0, 1)")
    if not options.distill and (options.prune is not None or options.sparsity is not None or options.qat):
        making.require_single(source)
    if options.quantize and ONNX_NAME not in source.spec.files and not options.distill:
        raise CompressionError(f"{source.directory}: has no ONNX file to quantise (its network can't be exported)")
    if "experiment.yaml" not in source.spec.files:
        raise CompressionError(f"{source.directory}: does not tell how it was trained (no experiment.yaml)")
    if out.resolve() == source.directory.resolve():
        raise CompressionError(f"{out}: is the bundle itself. Give another folder with -o")
    if out.exists() and not (out / "bundle.json").is_file() and any(out.iterdir()):
        raise CompressionError(f"{out}: is a folder with other files. Give another one with -o")


def _engine(bundle: Bundle, options: CompressOptions) -> Any:
    return bundle.predictor(options.runtime, threads=options.threads)


def _try(
    name: str,
    make: Make,
    aim: Aim,
    state: State,
    recipe: Recipe,
    options: CompressOptions,
    validation: Sequence[int],
    directory: Path,
) -> tuple[Step, State | None]:
    """One step, and the gate behind it; what it led to, or None where nothing could be measured."""
    try:
        bundle, experiment, facts = make(directory)
        engine, before = _engine(bundle, options), _engine(state.bundle, options)
        scores = score_bundle(bundle, engine, recipe, validation)
        with torch_threads(options.threads):
            times = race({("torch", "before"): before, ("torch", "after"): engine}, bundle.golden()[0])
    except MedrayError as error:
        return Step(name=name, kept=False, reason=str(error)), None
    except RuntimeError as error:  # of a library that met a network it doesn't know: the steps before it stand
        return Step(name=name, kept=False, reason=f"{type(error).__name__}: {error}"), None
    verdict = judge(
        (state.bundle, before, state.scores, float(np.median(times["torch", "before"]))),
        (bundle, engine, scores, float(np.median(times["torch", "after"]))),
    )
    reason = verdict.against(options.max_drop, aim)
    step = Step(name=name, kept=not reason, reason=reason, verdict=verdict, facts=facts)
    return step, State(bundle=bundle, experiment=experiment, scores=scores)


def _settle(tried: Sequence[tuple[Step, State | None]]) -> tuple[list[Step], State | None]:
    """Of several ways to one end that the gate let through, the one that loses least; the first where they are equal.

    Returns:
        The steps, each way after the first with how it compares to that one; and what is kept, None for nothing.
    """
    one, first = tried[0]
    steps: list[Step] = []
    for step, state in tried:
        compared = ""
        if state is not first and state is not None and first is not None:
            compared = f"against {one.name}: {_compared(first, state)}"
        steps.append(replace(step, compared=compared))
    passed = [number for number, step in enumerate(steps) if step.kept]
    if not passed:
        return steps, None
    best = min(passed, key=lambda number: _worst(steps[number]))
    for number in passed:
        if number != best:
            lost = f"{_worst(steps[best]):.4f} at most, this one {_worst(steps[number]):.4f}"
            reason = f"{steps[best].name} loses no more: {lost}"
            steps[number] = replace(steps[number], kept=False, reason=reason)
    return steps, tried[best][1]


def _worst(step: Step) -> float:
    """The largest drop of any metric."""
    assert step.verdict is not None
    return max(drop.value for drop in step.verdict.drops.values())


def _compared(first: State, other: State) -> str:
    """What another way has over the first, paired by patient."""
    parts = []
    for metric in first.scores.task.guarded:
        gain = difference(replace(other.scores, metric=metric), replace(first.scores, metric=metric))
        parts.append(f"{metric} {gain.value:+.4f} (95 % CI {gain.low:+.4f} to {gain.high:+.4f})")
    return ", ".join(parts)
