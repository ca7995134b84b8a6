"""Train one Experiment: ``medray train``, each trial of a study, and the final fits are this."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medray.config.compose import build_experiment, compose
from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.loader import train_loader
from medray.data.manifest import Manifest
from medray.errors import ConfigError, MissingDependencyError, TrainingError
from medray.learn.losses import build_loss
from medray.models.catalogue import build_model
from medray.tracking import NullTracker, TensorBoardTracker, Tracker
from medray.train.fit import fit
from medray.train.precision import resolve_device
from medray.train.progress import FitResult, Progress
from medray.train.runtime import LocalRuntime, Runtime
from medray.workflows.events import Observer, StudyEvent
from medray.workflows.judging import OBJECTIVE, Direction, make_validate
from medray.workflows.planning import default_cache, dump, prepare_directory
from medray.workflows.recipe import Recipe


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
    """

    fit: FitResult
    directory: Path

    @property
    def headline(self) -> str:
        """One line: the best validation figures."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.fit.best.items())
        return f"{figures} (epoch {self.fit.best_epoch}, {self.fit.seconds:.0f} s, {self.fit.stopped})"


def outputs(manifest: Manifest) -> int:
    """Channels of the network's last layer: a class each (binary classification has two)."""
    return len(manifest.classes)


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
    runtime: Runtime | None = None,
    train_indices: Sequence[int] | None = None,
) -> Trained:
    """Train an experiment in ``directory``; where it was interrupted there, go on.

    Args:
        recipe: whence the data.
        experiment: what to train.
        directory: of this run alone.
        objective: the metric that chooses the best weights, and its direction.
        on_validation: called after each validation; True stops the run as pruned.
        deadline: ``time.monotonic()`` at which to stop in any case.
        tracker: gets scalars; None writes TensorBoard events to ``directory``.
        runtime: None is one process on the experiment's device.
        train_indices: cases to train on; None: the split's own.
    """
    manifest = recipe.manifest
    directory.mkdir(parents=True, exist_ok=True)
    experiment = _as_begun(directory, experiment)
    partial = directory / "experiment.yaml.part"
    partial.write_text(dump(experiment), encoding="utf-8")
    partial.replace(directory / "experiment.yaml")
    done = load_trained(recipe, directory)
    if done is not None and done.experiment == experiment:
        return done
    splits = recipe.splits(experiment)
    store = open_store(recipe, experiment)
    runtime = runtime or LocalRuntime(resolve_device(experiment.device))
    kind, classes = manifest.task, outputs(manifest)
    loader = train_loader(store, tuple(train_indices or splits.train), experiment, kind=kind, num_classes=classes)
    model = new_model(experiment, manifest)
    result = fit(
        experiment,
        model,
        loader,
        build_loss(experiment.loss, kind=kind, num_classes=classes),
        validate=make_validate(store, splits.val, experiment, kind=kind, num_classes=classes, device=runtime.device),
        objective=objective or OBJECTIVE[kind],
        runtime=runtime,
        run_dir=directory,
        tracker=tracker or TensorBoardTracker(directory / "tensorboard"),
        on_validation=on_validation,
        deadline=deadline,
    )
    model = new_model(experiment, manifest)
    model.load_state_dict(result.weights)
    _save_trained(directory, result)
    return Trained(model=model.eval(), experiment=experiment, fit=result, directory=directory)


def _as_begun(directory: Path, experiment: Experiment) -> Experiment:
    """The experiment that a run in ``directory`` began with, where only the time that it is given differs.

    A resumed study has other seconds left than it had; the schedule that was laid out at the start still holds.
    """
    path = directory / "experiment.yaml"
    if not path.is_file():
        return experiment
    begun = build_experiment(compose(path, []).explicit)
    same = begun.model_copy(update={"train": begun.train.model_copy(update={"budget": experiment.train.budget})})
    return begun if same == experiment else experiment


def _save_trained(directory: Path, result: FitResult) -> None:
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
    }
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
    return Trained(
        model=model.eval(), experiment=experiment, fit=FitResult(weights=weights, **summary), directory=directory
    )


def train_experiment(
    path: Path | None,
    overrides: Sequence[str],
    *,
    out: Path,
    resume: bool = False,
    observer: Observer | None = None,
) -> Trained:
    """``medray train``: check the data, lay the experiment over the plan, train, save.

    Args:
        path: an ``experiment.yaml``; None trains the plan's default on ``data=...``.
        overrides: ``optim.lr=1e-3`` and such.
        out: folder of the run.
        resume: go on where a run in ``out`` stopped.
        observer: hears of progress.

    Raises:
        ConfigError: ``out`` holds a run already and ``resume`` is off, or a field is refused.
    """
    started = time.monotonic()
    if (out / "experiment.yaml").exists() and not resume:
        raise ConfigError(f"{out} holds a run already. Go on with it by --resume, or choose another folder with --out")
    composed = compose(path, overrides)
    source = str(composed.explicit.get("data") or Experiment().data)
    task = str((composed.explicit.get("task") or {}).get("kind", "auto"))
    notify = observer or (lambda _: None)
    if not (out / "fingerprint.json").exists():
        notify(StudyEvent(kind="stage", text=f"checking {source}"))
        prepare_directory(source, out, task=task, split=composed.explicit.get("split"))
    recipe = Recipe(directory=str(out), explicit=composed.explicit, cache=str(default_cache()))
    experiment = recipe.experiment()

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
        return False

    notify(StudyEvent(kind="stage", text=f"training {experiment.model.name}", elapsed=time.monotonic() - started))
    return train_model(recipe, experiment, out, on_validation=progress, tracker=_tracker(out))


def _tracker(directory: Path) -> Tracker:
    try:
        return TensorBoardTracker(directory / "tensorboard")
    except MissingDependencyError:
        return NullTracker()
