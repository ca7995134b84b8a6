"""Make a bundle smaller and faster, each step behind a gate: ``medray compress``.

distil, then prune, then quantise: each takes what the former kept. A step is kept where the metrics fall by no more
than ``max_drop`` on validation cases (never test ones) and the runtime that will serve is faster by it; else it is
undone and reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from medray.bundle.engines import ONNX_NAME, RuntimeChoice, race, torch_threads
from medray.bundle.files import locate
from medray.bundle.read import Bundle
from medray.bundle.write import derive, write_bundle
from medray.compress.distill import PREFIX, DistillationLoss, Taught
from medray.compress.prune import prune
from medray.compress.quantize import quantize_dynamic, quantize_static
from medray.config.compose import build_experiment, compose
from medray.config.schema import Experiment
from medray.data.fingerprint import Fingerprint
from medray.data.loader import train_loader
from medray.errors import CompressionError, MedrayError
from medray.models.catalogue import build_model, lookup
from medray.predict.postprocess import fit_thresholds
from medray.predict.predictor import probabilities
from medray.tasks.catalogue import build_loss, find_task
from medray.train.fit import fit
from medray.train.precision import resolve_device
from medray.train.progress import FitResult
from medray.train.runtime import LocalRuntime
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate, Scores
from medray.workflows.gate import Verdict, calibration_batches, judge, score_bundle
from medray.workflows.judging import make_validate
from medray.workflows.planning import default_cache, dump, prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, new_model, open_store

Note = Callable[[str], None]
"""Told what is being done, a sentence at a time."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What to try.

    Attributes:
        quantize: int8: static, with calibration cases; dynamic: linear layers' weights alone.
        prune: share of channels to take away.
        distill: the student's name in the catalogue.
        max_drop: what each metric may lose, in its own unit.
        runtime: what will serve, in which speed is measured.
        threads: of that runtime; None: all usable CPUs.
        calibration: training cases that static quantisation looks at.
        temperature, alpha: of distillation.
    """

    quantize: Literal["int8", "dynamic"] | None = None
    prune: float | None = None
    distill: str | None = None
    max_drop: float = 0.005
    runtime: RuntimeChoice = "auto"
    threads: int | None = None
    calibration: int = 64
    temperature: float = 4.0
    alpha: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step that was tried.

    Attributes:
        name: such as ``prune 0.5``.
        kept: whether the result is built on it.
        reason: why it was undone; empty where it was kept.
        verdict: what the gate measured; None where the step failed before it.
        facts: multiplications and parameters before and after, cases looked at, seconds of training.
    """

    name: str
    kept: bool
    reason: str = ""
    verdict: Verdict | None = None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """For the card."""
        measured = f": {self.verdict.shown}" if self.verdict else ""
        return f"{self.name}{measured}" + ("" if self.kept else f"; undone: {self.reason}")


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


@dataclass(kw_only=True)
class _State:
    """The bundle so far, and what its network is trained by."""

    bundle: Bundle
    experiment: Experiment
    scores: Scores


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
    recipe, experiment = _recipe(source, overrides, work)
    validation = recipe.splits(experiment).val
    note(f"measuring {source.spec.name} on {len(validation)} validation cases")
    scores = score_bundle(source, _engine(source, options), recipe, validation)
    state = _State(bundle=source, experiment=experiment, scores=scores)
    made: list[tuple[str, Callable[[Path], tuple[Bundle, Experiment, dict[str, float]]]]] = []
    if options.distill:
        made.append((f"distill {options.distill}", lambda at: _distill(state, recipe, overrides, options, at)))
    if options.prune is not None:
        made.append((f"prune {options.prune:g}", lambda at: _prune(state, recipe, float(options.prune or 0), at)))
    if options.quantize:
        made.append((f"quantize {options.quantize}", lambda at: _quantize(state, recipe, options, at)))
    steps = []
    for name, make in made:
        note(name)
        step = _try(name, make, state, recipe, options, validation, work / name.replace(" ", "-").replace(":", "-"))
        note(step.sentence)
        steps.append(step)
    kept = state.bundle is not source
    if kept:
        derive(state.bundle, out, history=[f"From bundle {source.spec.name!r} by:", *(s.sentence for s in steps)])
    report = CompressReport(
        source=source.directory, bundle=out if kept else None, validation_cases=len(validation), steps=tuple(steps)
    )
    (work / "report.json").write_text(json.dumps(asdict(report), indent=1, default=str), encoding="utf-8")
    return report


def _check(source: Bundle, options: CompressOptions, out: Path) -> None:
    if not (options.quantize or options.prune is not None or options.distill):
        raise CompressionError("nothing to do: give --quantize int8, --prune 0.5, --distill NAME, or several of them")
    if source.spec.precision == "int8":
        raise CompressionError(f"{source.directory}: is int8 already. Compress the bundle that it was made from")
    if options.max_drop < 0 or not math.isfinite(options.max_drop) or options.calibration < 1:
        raise CompressionError(
            f"--max-drop {options.max_drop} must be at least 0, and --calibration {options.calibration} at least 1"
        )
    if options.prune is not None and not 0 < options.prune < 1:
        raise CompressionError(f"--prune {options.prune}: the share of channels to take away lies between 0 and 1")
    if options.prune is not None and not options.distill and len(source.spec.members) > 1:
        raise CompressionError("an ensemble can't be pruned as one. Make one network of it first: --distill NAME")
    if options.quantize and ONNX_NAME not in source.spec.files and not options.distill:
        raise CompressionError(f"{source.directory}: has no ONNX file to quantise (its network can't be exported)")
    if "experiment.yaml" not in source.spec.files:
        raise CompressionError(f"{source.directory}: does not tell how it was trained (no experiment.yaml)")
    if out.resolve() == source.directory.resolve():
        raise CompressionError(f"{out}: is the bundle itself. Give another folder with -o")
    if out.exists() and not (out / "bundle.json").is_file() and any(out.iterdir()):
        raise CompressionError(f"{out}: is a folder with other files. Give another one with -o")


def _recipe(source: Bundle, overrides: Sequence[str], work: Path, *, student: str | None = None) -> tuple[Recipe, Any]:
    """Whence the cases, split as when the bundle was trained; and the experiment, under the overrides."""
    own = compose(locate(source.directory, "experiment.yaml"), []).explicit
    tree = build_experiment(own).model_dump(mode="json")
    if student is not None:
        # What depends on the network is planned anew; what the teacher needs to see the same images stays.
        tree["model"] = {"name": student}
        del tree["optim"]
    else:
        tree["model"] = source.spec.members[0].model_dump(mode="json")
    tree["train"]["freeze_epochs"] = 0  # what is held at cut or new weights learns nothing
    if student is not None:
        # The teacher says nothing of a variance.
        plain = {"heteroscedastic": "cross_entropy", "dice_heteroscedastic": "dice_ce"}
        tree["loss"]["name"] = plain.get(tree["loss"]["name"], tree["loss"]["name"])
    given = compose(None, overrides).explicit
    for section in ("split", "task", "preprocess"):
        if section in given:
            raise CompressionError(
                f"{section}.…: stays as the bundle was trained by: the cases that validated it judge what is made of "
                "it, seen alike. Leave it out"
            )
    for section, value in given.items():
        tree[section] = {**tree.get(section, {}), **value} if isinstance(value, dict) else value
    if (given.get("train") or {}).get("epochs") and "budget" not in given["train"]:
        tree["train"]["budget"] = None
    spec = source.spec
    if tree["preprocess"] != spec.preprocess.model_dump(mode="json"):
        raise CompressionError("preprocess.…: a compressed bundle sees images as the one it is made from does")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "manifest.json").exists() or not (work / "fingerprint.json").exists():
        prepare_directory(str(tree["data"]), work, task=spec.kind, split=tree["split"])
    recipe = Recipe(directory=str(work), explicit=tree, cache=str(default_cache()))
    manifest = recipe.manifest
    if manifest.source != str(tree["data"]):
        raise CompressionError(f"{work}: belongs to data {manifest.source}, not {tree['data']}. Remove it")
    if (manifest.ndim, manifest.channels, tuple(manifest.classes)) != (spec.ndim, spec.channels, spec.classes):
        raise CompressionError(
            f"{tree['data']}: {manifest.ndim}-D with {manifest.channels} channel(s) and classes "
            f"{', '.join(manifest.classes)}; the bundle was trained on others. Give its own data with data=..."
        )
    if "fingerprint.json" in spec.files:
        then, now = Fingerprint.load(locate(source.directory, "fingerprint.json")), recipe.fingerprint
        if (then.cases, then.patients) != (now.cases, now.patients):
            raise CompressionError(
                f"{tree['data']}: has {now.cases} cases of {now.patients} patients besides the test ones; the bundle "
                f"was trained with {then.cases} of {then.patients}. Among others, training cases might judge. Give "
                "the data as they were"
            )
    return recipe, recipe.experiment()


def _engine(bundle: Bundle, options: CompressOptions) -> Any:
    return bundle.predictor(options.runtime, threads=options.threads)


def _try(
    name: str,
    make: Callable[[Path], tuple[Bundle, Experiment, dict[str, float]]],
    state: _State,
    recipe: Recipe,
    options: CompressOptions,
    validation: Sequence[int],
    directory: Path,
) -> Step:
    """One step, and the gate behind it; ``state`` moves on where it is kept."""
    try:
        bundle, experiment, facts = make(directory)
        engine, before = _engine(bundle, options), _engine(state.bundle, options)
        scores = score_bundle(bundle, engine, recipe, validation)
        with torch_threads(options.threads):
            times = race({("torch", "before"): before, ("torch", "after"): engine}, bundle.golden()[0])
    except MedrayError as error:
        return Step(name=name, kept=False, reason=str(error))
    except RuntimeError as error:  # of a library that met a network it doesn't know: the steps before it stand
        return Step(name=name, kept=False, reason=f"{type(error).__name__}: {error}")
    verdict = judge(
        (state.bundle, before, state.scores, float(np.median(times["torch", "before"]))),
        (bundle, engine, scores, float(np.median(times["torch", "after"]))),
    )
    reason = verdict.against(options.max_drop)
    if not reason:
        state.bundle, state.experiment, state.scores = bundle, experiment, scores
    return Step(name=name, kept=not reason, reason=reason, verdict=verdict, facts=facts)


def _quantize(
    state: _State, recipe: Recipe, options: CompressOptions, directory: Path
) -> tuple[Bundle, Experiment, dict[str, float]]:
    source = state.bundle
    if ONNX_NAME not in source.spec.files:
        raise CompressionError(f"{source.directory}: has no ONNX file to quantise")
    directory.mkdir(parents=True, exist_ok=True)
    target, facts = directory / "int8.onnx", {}
    path = locate(source.directory, ONNX_NAME)
    if options.quantize == "dynamic":
        quantize_dynamic(path, target)
    else:
        store = open_store(recipe, state.experiment)
        training = recipe.splits(state.experiment).train
        cases = calibration_batches(source, store, training, options.calibration, state.experiment.seed)
        facts["calibration_cases"] = float(quantize_static(path, target, cases))
    bundle = derive(source, directory / "bundle", onnx=target)
    return bundle, state.experiment, facts


def _prune(state: _State, recipe: Recipe, ratio: float, directory: Path) -> tuple[Bundle, Experiment, dict[str, float]]:
    source, spec = state.bundle, state.bundle.spec
    if len(spec.members) > 1:
        raise CompressionError("an ensemble can't be pruned as one. Make one network of it first: --distill NAME")
    member = spec.members[0]
    wide = build_model(
        member,
        kind=spec.kind,
        ndim=spec.ndim,
        in_channels=spec.channels,
        num_outputs=spec.outputs,
        patch_size=spec.inference.patch_size or spec.preprocess.size,
    )
    example = torch.from_numpy(source.golden()[0][:1])
    cut = prune(source.model(), ratio, example, outputs=spec.outputs, wide=wide)
    optim = state.experiment.optim
    # What is left knows most of it already: a smaller rate keeps that.
    experiment = state.experiment.model_copy(
        update={"optim": optim.model_copy(update={"lr": optim.lr * 0.3}), "model": member}
    )
    loss = build_loss(experiment.loss, kind=spec.kind, num_classes=len(spec.classes))
    result = _fit(recipe, experiment, cut.model, loss, directory)
    cut.model.load_state_dict(result.weights)
    bundle = _write(state, recipe, experiment, cut.model, directory, widths=cut.widths)
    facts = {"macs_before": cut.macs[0], "macs_after": cut.macs[1], "seconds": result.seconds}
    facts |= {"parameters_before": cut.parameters[0], "parameters_after": cut.parameters[1]}
    return bundle, experiment, facts


def _distill(
    state: _State, recipe: Recipe, overrides: Sequence[str], options: CompressOptions, directory: Path
) -> tuple[Bundle, Experiment, dict[str, float]]:
    assert options.distill is not None
    source, spec = state.bundle, state.bundle.spec
    planned, experiment = _recipe(source, overrides, Path(recipe.directory), student=options.distill)
    teacher, student = source.model(), new_model(experiment, recipe.manifest)
    facts = {"parameters_before": _count(teacher), "parameters_after": _count(student)}
    hard = build_loss(experiment.loss, kind=spec.kind, num_classes=len(spec.classes))
    loss = DistillationLoss(hard, spec.kind, temperature=options.temperature, alpha=options.alpha)
    result = _fit(planned, experiment, Taught(student, teacher), loss, directory)
    student.load_state_dict({name.removeprefix(PREFIX): value for name, value in result.weights.items()})
    return _write(state, planned, experiment, student, directory), experiment, facts | {"seconds": result.seconds}


def _count(model: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in model.parameters()))


def _fit(recipe: Recipe, experiment: Experiment, model: nn.Module, loss: nn.Module, directory: Path) -> FitResult:
    """Train by the same fit() as any trial; the folder keeps what it was trained by."""
    manifest, runtime = recipe.manifest, LocalRuntime(resolve_device(experiment.device))
    store, splits = open_store(recipe, experiment), recipe.splits(experiment)
    kind, classes = manifest.task, len(manifest.classes)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "experiment.yaml").write_text(dump(experiment), encoding="utf-8")
    return fit(
        experiment,
        model.train(),
        train_loader(store, splits.train, experiment, kind=kind, num_classes=classes),
        loss,
        validate=make_validate(store, splits.val, experiment, kind=kind, num_classes=classes, runtime=runtime),
        objective=find_task(kind).objective,
        runtime=runtime,
    )


def _write(
    state: _State,
    recipe: Recipe,
    experiment: Experiment,
    model: nn.Module,
    directory: Path,
    *,
    widths: dict[str, tuple[int, int, int]] | None = None,
) -> Bundle:
    """A bundle of newly trained weights, calibrated anew on validation cases."""
    spec, indices = state.bundle.spec, recipe.splits(experiment).val
    candidate = Candidate(name="compressed", members=(Network(model=model.eval(), experiment=experiment),))
    metric = find_task(spec.kind).objective[0].removeprefix("val/")
    scores = choosing.score(recipe, [candidate], indices, metric=metric)["compressed"]
    temperature = choosing.temperature_of(scores)
    thresholds = None
    if spec.task.thresholds:
        assert scores.logits is not None and scores.targets is not None
        thresholds = fit_thresholds(probabilities(scores.logits, spec.kind, temperature), scores.targets)
    divisor = lookup(experiment.model.name).divisor(experiment.model, spec.ndim)
    return write_bundle(
        directory / "bundle",
        kind=spec.kind,
        ndim=spec.ndim,
        channels=spec.channels,
        classes=spec.classes,
        modality=spec.modality,
        name=spec.name,
        preprocess=spec.preprocess,
        inference=spec.inference.model_copy(update={"divisor": divisor}),
        models=[model],
        configs=[experiment.model],
        temperature=temperature,
        thresholds=thresholds,
        golden=state.bundle.golden()[0] if spec.golden == "data" else None,
        experiment=experiment,
        fingerprint=recipe.fingerprint,
        metrics={f"val/{metric}": float(scores.value) if math.isfinite(scores.value) else None},
        intended_use=spec.intended_use,
        pruned=widths,
    )
