"""Train one Experiment: ``medray train``, each trial of a study, and the final fits are this."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medray.config.compose import Composed, build_experiment, compose
from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.loader import train_loader
from medray.data.manifest import Manifest
from medray.engines.ray.session import ray_session, usable_cpus
from medray.errors import ConfigError, MissingDependencyError, OutOfMemoryError, TrainingError
from medray.models.catalogue import build_model
from medray.privacy.statement import Statement
from medray.tasks.catalogue import build_loss, find_task
from medray.tasks.task import Direction
from medray.tracking import NullTracker, TensorBoardTracker, Tracker, Trackers
from medray.train.fit import CHECKPOINT, fit
from medray.train.precision import resolve_device
from medray.train.progress import FitResult, Progress
from medray.train.runtime import LocalRuntime, Runtime
from medray.workflows.events import Observer, StudyEvent
from medray.workflows.examples import Examples
from medray.workflows.judging import make_validate
from medray.workflows.mirror import Mirror, mirrored
from medray.workflows.planning import default_cache, dump, prepare_directory
from medray.workflows.predictions import Predictions
from medray.workflows.private import begin, private_validate
from medray.workflows.recipe import Recipe
from medray.workflows.sitting import Sitting, sitting
from medray.workflows.storage import RunStore, place_of, read_mark


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network, and the experiment that says how images reach it.

    Attributes:
        model: in evaluation mode, on the CPU.
        experiment: its own.
    """

    model: nn.Module
    experiment: Experiment


@dataclass(frozen=True, kw_only=True)
class Trained(Network):
    """A network with the weights of its best validation, and how it came to be.

    Attributes:
        fit: what fit() returned.
        directory: ``experiment.yaml``, ``weights.safetensors``, ``result.json``, TensorBoard events.
        privacy: what the run says of its differential privacy, in sentences; empty where it has none.
    """

    fit: FitResult
    directory: Path
    privacy: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """One line: the best validation figures (under differential privacy the last, with its noise)."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.fit.best.items()) or "no figure released"
        return f"{figures} (epoch {self.fit.best_epoch}, {self.fit.seconds:.0f} s, {self.fit.stopped})"


def outputs(manifest: Manifest) -> int:
    """Channels of the network's last layer."""
    return find_task(manifest.task).outputs(len(manifest.classes))


def new_model(experiment: Experiment, manifest: Manifest) -> nn.Module:
    """A fresh network, its weights drawn from the experiment's seed."""
    torch.manual_seed(experiment.seed)
    patch = experiment.train.patch_size or experiment.preprocess.size
    return build_model(
        experiment.model,
        kind=manifest.task,
        ndim=manifest.ndim,
        in_channels=manifest.channels,
        num_outputs=outputs(manifest),
        patch_size=patch,
    )


def open_store(recipe: Recipe, experiment: Experiment) -> PreparedStore:
    """The prepared cases of a recipe, built if they aren't there."""
    return PreparedStore.open_or_build(recipe.manifest, experiment.preprocess, Path(recipe.cache))


def train_model(
    recipe: Recipe,
    experiment: Experiment,
    directory: Path,
    *,
    objective: tuple[str, Direction] | None = None,
    on_validation: Callable[[Progress], bool] | None = None,
    deadline: float | None = None,
    tracker: Tracker | None = None,
    train_indices: Sequence[int] | None = None,
    cpus: int | None = None,
    gpus: int | None = None,
) -> Trained:
    """Train an experiment in ``directory``; where it was interrupted there, go on.

    With ``train.workers`` above one, a group of processes does it, and this one waits for them; Ray must be connected.

    Args:
        recipe: whence the data.
        experiment: what to train.
        directory: of this run alone.
        objective: the metric that chooses the best weights, and its direction.
        on_validation: called after each validation; True stops the run as pruned.
        deadline: ``time.monotonic()`` at which to stop in any case.
        tracker: gets scalars; None writes TensorBoard events to ``directory``. A group always does the latter.
        train_indices: cases to train on; None: the split's own.
        cpus: that a group's processes share; None: as many as this process has threads.
        gpus: of each process of a group; None: one, where the experiment's device is one here.
    """
    manifest = recipe.manifest
    directory.mkdir(parents=True, exist_ok=True)
    experiment = _as_begun(directory, experiment)
    _write_experiment(directory, experiment)
    done = load_trained(recipe, directory)
    if done is not None and done.experiment == experiment:
        return done
    open_store(recipe, experiment)  # here, once, rather than in every process of a group
    run = _Run(
        recipe=recipe,
        experiment=experiment,
        directory=directory,
        objective=objective or find_task(manifest.task).objective,
        indices=tuple(train_indices or recipe.splits(experiment).train),
        deadline=None if deadline is None else time.time() + deadline - time.monotonic(),
    )
    if experiment.train.workers > 1:
        if gpus is None:
            gpus = int(resolve_device(experiment.device).type == "cuda")
        _train_together(run, on_validation or (lambda _: False), cpus or torch.get_num_threads(), gpus)
    elif experiment.privacy.on:
        _train_privately(run, on_validation, tracker)
    else:
        _train_here(run, LocalRuntime(resolve_device(experiment.device)), on_validation, tracker)
    trained = load_trained(recipe, directory)
    if trained is None:
        raise TrainingError(f"{directory}: training ended without a result")
    return trained


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What each process that trains is handed.

    Attributes:
        deadline: epoch seconds.
        others: as in :func:`train_model`.
    """

    recipe: Recipe
    experiment: Experiment
    directory: Path
    objective: tuple[str, Direction]
    indices: tuple[int, ...]
    deadline: float | None


def _train_here(
    run: _Run, runtime: Runtime, on_validation: Callable[[Progress], bool] | None, tracker: Tracker | None = None
) -> None:
    """Train in this process, alone or as one of a group; the main one writes the result."""
    experiment, manifest, directory = run.experiment, run.recipe.manifest, run.directory
    store, splits = open_store(run.recipe, experiment), run.recipe.splits(experiment)
    kind, classes = manifest.task, len(manifest.classes)
    if tracker is None:
        tracker = TensorBoardTracker(directory / "tensorboard") if runtime.is_main else NullTracker()
    examples = Examples(store, Trackers([tracker]))
    predictions = Predictions(directory, run.objective)

    def validated(progress: Progress) -> bool:
        examples.draw(progress)
        predictions.keep(progress)
        return on_validation is not None and on_validation(progress)

    result = fit(
        experiment,
        new_model(experiment, manifest),
        train_loader(store, run.indices, experiment, kind=kind, num_classes=classes),
        build_loss(experiment.loss, kind=kind, num_classes=classes),
        validate=make_validate(
            store,
            splits.val,
            experiment,
            kind=kind,
            num_classes=classes,
            runtime=runtime,
            examples=examples,
            predictions=predictions.take,
        ),
        objective=run.objective,
        runtime=runtime,
        run_dir=directory,
        tracker=tracker,
        on_validation=validated,
        deadline=None if run.deadline is None else time.monotonic() + run.deadline - time.time(),
    )
    tracker.close()
    if runtime.is_main:
        if experiment.train.micro_batch == "auto":
            found = experiment.train.model_copy(update={"micro_batch": result.micro_batch})
            _write_experiment(directory, experiment.model_copy(update={"train": found}))
        _save_trained(directory, result)


def _train_privately(
    run: _Run, on_validation: Callable[[Progress], bool] | None, tracker: Tracker | None = None
) -> None:
    """Train under differential privacy: nothing is told of private cases but what the epsilon covers."""
    experiment, manifest, directory = run.experiment, run.recipe.manifest, run.directory
    store, splits = open_store(run.recipe, experiment), run.recipe.splits(experiment)
    kind, classes = manifest.task, len(manifest.classes)
    private = begin(experiment, manifest, run.indices, directory)
    tracker = tracker or TensorBoardTracker(directory / "tensorboard")
    result = fit(
        experiment,
        new_model(experiment, manifest),
        train_loader(store, run.indices, experiment, kind=kind, num_classes=classes),
        build_loss(experiment.loss, kind=kind, num_classes=classes),
        validate=private_validate(private, store, splits.val, experiment, manifest),
        objective=find_task(kind).private_objective,
        runtime=private.runtime,
        run_dir=directory,
        tracker=tracker,
        on_validation=on_validation,
        deadline=None if run.deadline is None else time.monotonic() + run.deadline - time.time(),
    )
    tracker.close()
    _save_trained(directory, result, private.statement([name.removeprefix("val/") for name in result.best]))
    private.settle()


def _train_together(run: _Run, on_validation: Callable[[Progress], bool], cpus: int, gpus: int) -> None:
    """Train in a group of processes; where a part of a batch doesn't fit, begin again with smaller ones."""
    from medray.engines.ray.train import GroupSize, run_group

    train = run.experiment.train
    sync = train.sync_batchnorm
    size = GroupSize(
        workers=train.workers,
        least=train.min_workers,
        cpus=max(1, cpus // train.workers),
        gpus=gpus,
        sync_batchnorm=train.batch_size < 16 * train.workers if sync is None else sync,
    )
    while True:
        try:
            return run_group(_train_here, run, size, on_progress=on_validation)
        except OutOfMemoryError as error:
            if error.micro_batch is None:
                raise
            smaller = train.model_copy(update={"micro_batch": error.micro_batch})
            run = replace(run, experiment=run.experiment.model_copy(update={"train": smaller}))


def _write_experiment(directory: Path, experiment: Experiment) -> None:
    partial = directory / "experiment.yaml.part"
    partial.write_text(dump(experiment), encoding="utf-8")
    partial.replace(directory / "experiment.yaml")


def _as_begun(directory: Path, experiment: Experiment) -> Experiment:
    """The experiment that a run in ``directory`` began with, where only the time that it is given differs.

    A resumed study has other seconds left than it had; the schedule that was laid out at the start still holds. So does
    the micro-batch that was found to fit, where it is to be found.
    """
    path = directory / "experiment.yaml"
    if not path.is_file():
        return experiment
    begun = build_experiment(compose(path, []).explicit)
    asked = experiment.train
    free = ("workers", "min_workers", "loader_workers", "micro_batch", "checkpointing")
    parts = {name: getattr(asked, name) for name in free}
    found = begun.train.micro_batch
    begun = begun.model_copy(update={"train": begun.train.model_copy(update=parts)})
    same = begun.model_copy(update={"train": begun.train.model_copy(update={"budget": asked.budget})})
    if same != experiment:
        if any((directory / name).exists() for name in (CHECKPOINT, "result.json")):
            raise TrainingError(
                f"{directory} holds a run of another experiment: go on with the settings that it began with (its "
                "experiment.yaml), choose another folder with --out, or delete it"
            )
        return experiment
    if asked.micro_batch == "auto" and found is not None:
        begun = begun.model_copy(update={"train": begun.train.model_copy(update={"micro_batch": found})})
    return begun


def _save_trained(directory: Path, result: FitResult, privacy: Statement | None = None) -> None:
    """``weights.safetensors``, then ``result.json``: the latter's presence says that the run is whole."""
    partial = directory / "weights.safetensors.part"
    save_file({name: tensor.contiguous() for name, tensor in result.weights.items()}, str(partial))
    partial.replace(directory / "weights.safetensors")
    summary = {
        "best": result.best,
        "best_epoch": result.best_epoch,
        "history": list(result.history),
        "epochs": result.epochs,
        "steps": result.steps,
        "seconds": result.seconds,
        "stopped": result.stopped,
        "peak_memory_mb": result.peak_memory_mb,
        "step_seconds": result.step_seconds,
        "micro_batch": result.micro_batch,
        "loader_wait": result.loader_wait,
        "loader_workers": result.loader_workers,
    }
    if privacy is not None:
        summary["privacy"] = {**privacy.plain(), "statement": list(privacy.lines())}
    text = directory / "result.json.part"
    text.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    text.replace(directory / "result.json")


def load_trained(recipe: Recipe, directory: Path) -> Trained | None:
    """A run that has ended, from its folder; None where it has not.

    Raises:
        TrainingError: the folder's files don't fit each other.
    """
    if not (directory / "result.json").is_file() or not (directory / "weights.safetensors").is_file():
        return None
    summary: dict[str, Any] = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    composed = compose(directory / "experiment.yaml", [])
    experiment = build_experiment(composed.explicit)
    weights = load_file(str(directory / "weights.safetensors"))
    model = new_model(experiment, recipe.manifest)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(
            f"{directory}: weights.safetensors doesn't fit experiment.yaml ({error}). Delete the folder to train anew"
        ) from None
    summary["history"] = tuple(summary["history"])
    privacy = tuple(summary.pop("privacy", {}).get("statement", ()))
    return Trained(
        model=model.eval(),
        experiment=experiment,
        fit=FitResult(weights=weights, **summary),
        directory=directory,
        privacy=privacy,
    )


def train_experiment(
    path: Path | None,
    overrides: Sequence[str],
    *,
    out: Path,
    resume: bool = False,
    address: str | None = None,
    storage: str | None = None,
    observer: Observer | None = None,
) -> Trained:
    """``medray train``: check the data, lay the experiment over the plan, train, save.

    Args:
        path: an ``experiment.yaml``; None trains the plan's default on ``data=...``.
        overrides: ``optim.lr=1e-3`` and such.
        out: folder of the run.
        resume: go on where a run in ``out`` stopped; ``train.workers`` may be another number than before.
        address: of a Ray cluster for ``train.workers`` above one; None starts Ray on this machine.
        storage: ``s3://bucket/prefix``, below which the run is kept under the name of ``out``; where ``out`` is not
            there, ``resume`` fetches it. A run remembers its own.
        observer: hears of progress.

    Raises:
        ConfigError: ``out`` or the store holds a run already and ``resume`` is off, or a field is refused.
        StorageError: the store can't be read or written.
    """
    is_here = (out / "experiment.yaml").exists()
    if is_here and not resume:
        raise ConfigError(f"{out} holds a run already. Go on with it by --resume, or choose another folder with --out")
    composed = compose(path, overrides)
    place = place_of(out, storage)
    begun_here = is_here or bool(read_mark(out).get("writer"))  # a kill during the data check leaves no experiment
    if place is not None and not begun_here and RunStore.at(place).holds_run():
        if not resume:
            raise ConfigError(f"{place} holds a run already. Go on with it by --resume, or choose another --out")
        RunStore.at(place).fetch(out)

    def note(text: str) -> None:
        notify(StudyEvent(kind="note", text=text))

    with sitting(out, "train", observer=observer) as notify, mirrored(out, place, note) as mirror:
        return _train_composed(composed, out, address, notify, mirror)


def _train_composed(composed: Composed, out: Path, address: str | None, notify: Sitting, mirror: Mirror) -> Trained:
    started = time.monotonic()
    source = str(composed.explicit.get("data") or Experiment().data)
    if not (out / "fingerprint.json").exists():
        notify(StudyEvent(kind="stage", text=f"checking {source}"))
        asked = str((composed.explicit.get("task") or {}).get("kind", "auto"))
        prepare_directory(source, out, task=asked, split=composed.explicit.get("split"))
    recipe = Recipe(directory=str(out), explicit=composed.explicit, cache=str(default_cache()))
    experiment = recipe.experiment()
    if experiment.train.budget is not None:
        recipe = replace(recipe, horizon=experiment.train.budget)
        experiment = recipe.experiment()
    task = find_task(recipe.manifest.task)
    notify.measures(*(task.private_objective if experiment.privacy.on else task.objective))

    def progress(at: Progress) -> bool:
        notify(
            StudyEvent(
                kind="trial-progress",
                text=f"epoch {at.epoch}",
                trial=0,
                fraction=at.fraction,
                metrics=dict(at.metrics),
                elapsed=at.seconds,
            )
        )
        mirror.soon()
        return False

    notify(StudyEvent(kind="stage", text=f"training {experiment.model.name}", elapsed=time.monotonic() - started))
    if experiment.train.workers == 1:
        return train_model(recipe, experiment, out, on_validation=progress, tracker=_tracker(out))
    workers = experiment.train.workers
    cpus = max(workers, usable_cpus())
    # Workers have other working directories than we.
    recipe = replace(recipe, directory=str(out.resolve()), cache=str(Path(recipe.cache).resolve()))
    with ray_session(address=address, cpus=cpus, threads=cpus // workers) as session:
        if not session.is_local:
            cpus = max(workers, min(8 * workers, int(session.cpus)))
        gpus = int(session.gpus >= workers and experiment.device != "cpu")
        return train_model(recipe, experiment, out.resolve(), on_validation=progress, cpus=cpus, gpus=gpus)


def _tracker(directory: Path) -> Tracker:
    try:
        return TensorBoardTracker(directory / "tensorboard")
    except MissingDependencyError:
        return NullTracker()
