"""The steps of a compression: each makes a bundle from the one so far. Whether it is kept, the gate says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from medray.bundle.engines import ONNX_NAME, RuntimeChoice
from medray.bundle.files import locate
from medray.bundle.read import Bundle
from medray.bundle.write import derive, write_bundle
from medray.compress.distill import PREFIX, DistillationLoss, Taught
from medray.compress.prune import prune
from medray.compress.qat import Rounded
from medray.compress.quantize import quantize_dynamic, quantize_static
from medray.compress.sparsify import SPARSE, settled, sparsify, zero_share
from medray.config.compose import build_experiment, compose
from medray.config.schema import Experiment, ModelConfig
from medray.data.fingerprint import Fingerprint
from medray.data.loader import train_loader
from medray.errors import CompressionError
from medray.models.catalogue import build_model, lookup
from medray.models.narrow import Widths
from medray.predict.postprocess import fit_thresholds
from medray.predict.predictor import Floats, probabilities
from medray.tasks.catalogue import build_loss, find_task
from medray.train.fit import fit
from medray.train.precision import resolve_device
from medray.train.progress import FitResult
from medray.train.runtime import LocalRuntime
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate, Scores
from medray.workflows.gate import calibration_batches
from medray.workflows.judging import make_validate
from medray.workflows.planning import default_cache, dump, prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network, new_model, open_store


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """What to try.

    Attributes:
        quantize: int8: static, with calibration cases; dynamic: linear layers' weights alone.
        qat: int8 also after fine-tuning a network that rounds as int8 does; the better of the two may stay.
        prune: share of channels to take away.
        sparsity: share of single weights to become zero.
        distill: the student's name in the catalogue.
        max_drop: what each metric may lose, in its own unit.
        runtime: what will serve, in which speed is measured.
        threads: of that runtime; None: all usable CPUs.
        calibration: training cases that static quantisation looks at.
        temperature, alpha: of distillation.
    """

    quantize: Literal["int8", "dynamic"] | None = None
    qat: bool = False
    prune: float | None = None
    sparsity: float | None = None
    distill: str | None = None
    max_drop: float = 0.005
    runtime: RuntimeChoice = "auto"
    threads: int | None = None
    calibration: int = 64
    temperature: float = 4.0
    alpha: float = 0.5


@dataclass(kw_only=True)
class State:
    """The bundle so far, what its network is trained by, and what it does on validation cases."""

    bundle: Bundle
    experiment: Experiment
    scores: Scores


Made = tuple[Bundle, Experiment, dict[str, float]]
"""What a step makes: a bundle, what its network is trained by, and facts of the step."""
Make = Callable[[Path], Made]
"""Makes it in a folder of its own."""


def require_single(source: Bundle) -> None:
    """Refuse an ensemble where one network is worked on.

    Raises:
        CompressionError: it is one.
    """
    if len(source.spec.members) > 1:
        raise CompressionError(
            "an ensemble can't be pruned or trained on as one. Make one network of it first: --distill NAME"
        )


def recipe_of(
    source: Bundle, overrides: Sequence[str], work: Path, *, student: str | None = None
) -> tuple[Recipe, Any]:
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


def quantized(state: State, recipe: Recipe, options: CompressOptions, directory: Path) -> Made:
    """In int8: static, by calibration cases, or dynamic."""
    source = state.bundle
    directory.mkdir(parents=True, exist_ok=True)
    target, path, facts = directory / "int8.onnx", _onnx(source), {}
    if options.quantize == "dynamic":
        quantize_dynamic(path, target)
    else:
        facts["calibration_cases"] = float(quantize_static(path, target, _calibration(state, recipe, options)))
    return derive(source, directory / "bundle", onnx=target), state.experiment, facts


def rehearsed(state: State, recipe: Recipe, options: CompressOptions, directory: Path) -> Made:
    """In int8 after quantisation-aware training: the network is fine-tuned while it rounds, then quantised as any."""
    source = state.bundle
    require_single(source)
    _onnx(source)
    rounded = Rounded(source.model(), (torch.from_numpy(case) for case in _calibration(state, recipe, options)))
    optim, train = state.experiment.optim, state.experiment.train
    experiment = state.experiment.model_copy(
        update={
            # It only has to learn to live with rounding. Wrapped, the network shows no layers to tell rates apart by.
            "optim": optim.model_copy(update={"lr": optim.lr * 0.1, "layer_decay": 1.0}),
            # bf16 would round once more, and a block run twice would meet ranges that moved between.
            "train": train.model_copy(update={"precision": "fp32", "checkpointing": "off"}),
            "model": source.spec.members[0],
        }
    )
    loss = build_loss(experiment.loss, kind=source.spec.kind, num_classes=len(source.spec.classes))
    result = _fit(recipe, experiment, rounded, loss, directory)
    rounded.load_state_dict(result.weights)
    trained = _write(state, recipe, experiment, rounded.plain(), directory / "fp32", widths=source.spec.pruned)
    state = State(bundle=trained, experiment=experiment, scores=state.scores)
    bundle, _, facts = quantized(state, recipe, options, directory)
    return bundle, experiment, facts | {"seconds": result.seconds}


def _onnx(source: Bundle) -> Path:
    if ONNX_NAME not in source.spec.files:
        raise CompressionError(f"{source.directory}: has no ONNX file to quantise")
    return locate(source.directory, ONNX_NAME)


def _calibration(state: State, recipe: Recipe, options: CompressOptions) -> Iterator[Floats]:
    store = open_store(recipe, state.experiment)
    training = recipe.splits(state.experiment).train
    return calibration_batches(state.bundle, store, training, options.calibration, state.experiment.seed)


def pruned(state: State, recipe: Recipe, ratio: float, directory: Path) -> Made:
    """With fewer channels, fine-tuned."""
    source, spec = state.bundle, state.bundle.spec
    require_single(source)
    model, member = source.model(), spec.members[0]
    if zero_share(model) >= SPARSE:
        raise CompressionError(
            f"{zero_share(model):.0%} of the weights are zero, and fine-tuning would fill them. Prune the bundle that "
            f"it was made from: --prune {ratio:g} --sparsity ..."
        )
    wide = build_model(
        member,
        kind=spec.kind,
        ndim=spec.ndim,
        in_channels=spec.channels,
        num_outputs=spec.outputs,
        patch_size=spec.inference.patch_size or spec.preprocess.size,
    )
    example = torch.from_numpy(source.golden()[0][:1])
    cut = prune(model, ratio, example, outputs=spec.outputs, wide=wide)
    experiment = _gently(state.experiment, member)
    loss = build_loss(experiment.loss, kind=spec.kind, num_classes=len(spec.classes))
    result = _fit(recipe, experiment, cut.model, loss, directory)
    cut.model.load_state_dict(result.weights)
    bundle = _write(state, recipe, experiment, cut.model, directory, widths=cut.widths)
    facts = {"macs_before": cut.macs[0], "macs_after": cut.macs[1], "seconds": result.seconds}
    facts |= {"parameters_before": cut.parameters[0], "parameters_after": cut.parameters[1]}
    return bundle, experiment, facts


def sparse(state: State, recipe: Recipe, share: float, directory: Path) -> Made:
    """With a share of single weights at zero, fine-tuned."""
    source, spec = state.bundle, state.bundle.spec
    require_single(source)
    model = source.model()
    facts = {"zeros_before": zero_share(model)}
    masked = sparsify(model, share)
    experiment = _gently(state.experiment, spec.members[0])
    loss = build_loss(experiment.loss, kind=spec.kind, num_classes=len(spec.classes))
    result = _fit(recipe, experiment, masked, loss, directory)
    masked.load_state_dict(result.weights)
    model = settled(masked)
    facts |= {"zeros_after": zero_share(model), "seconds": result.seconds}
    return _write(state, recipe, experiment, model, directory, widths=spec.pruned), experiment, facts


def _gently(experiment: Experiment, member: ModelConfig) -> Experiment:
    """For fine-tuning what is left of a network: it knows most of it already, and a smaller rate keeps that."""
    optim = experiment.optim
    return experiment.model_copy(update={"optim": optim.model_copy(update={"lr": optim.lr * 0.3}), "model": member})


def distilled(
    state: State, recipe: Recipe, overrides: Sequence[str], options: CompressOptions, directory: Path
) -> Made:
    """A student of the catalogue, taught by the bundle."""
    assert options.distill is not None
    source, spec = state.bundle, state.bundle.spec
    planned, experiment = recipe_of(source, overrides, Path(recipe.directory), student=options.distill)
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
    state: State,
    recipe: Recipe,
    experiment: Experiment,
    model: nn.Module,
    directory: Path,
    *,
    widths: Widths | None = None,
) -> Bundle:
    """A bundle of newly trained weights, calibrated anew on validation cases."""
    spec, indices = state.bundle.spec, recipe.splits(experiment).val
    candidate = Candidate(name="compressed", members=(Network(model=model.eval(), experiment=experiment),))
    metric = find_task(spec.kind).objective[0].removeprefix("val/")
    scores = choosing.score(recipe, [candidate], indices, metric=metric)["compressed"]
    temperature = choosing.temperature_of(scores)
    value = replace(scores, temperature=temperature).value
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
        metrics={f"val/{metric}": float(value) if math.isfinite(value) else None},
        intended_use=spec.intended_use,
        pruned=widths,
    )
