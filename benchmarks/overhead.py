"""What does the platform cost? The same 8 trials by ``medray tune`` and by a bare PyTorch loop, in turn.

Bare: the same network, prepared tensors, loss, precision, number of optimiser steps and of validations, in one plain
loop without Ray, Optuna or medray's fit, from the start of its interpreter to its last trial. medray: from the start of
``medray tune`` on the raw data until the last trial has ended; then it is interrupted, since the final fit and the
report have no counterpart. Trials are fixed in steps, so both do the same work. One at a time, bare trials come half
before and half after medray's, so that a drift of the machine weighs on both; two at a time, two bare ones run side
by side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT, Figure, Result, Target

if TYPE_CHECKING:
    from medray.workflows.recipe import Recipe

STARTED = time.monotonic()
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "augment": {"strength": 0.0, "p_affine": 0.0, "p_elastic": 0.0, "p_noise": 0.0, "p_blur": 0.0}
    | dict.fromkeys(("p_brightness", "p_contrast", "p_gamma", "p_low_resolution", "p_bias_field"), 0.0),
    "train": {"ema": 0.0, "deterministic": False},
}
"""Augmentation and averaged weights are choices of an experiment, and have their own benchmark; here both sides do
without."""
VALIDATIONS = 4
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run.

    Attributes:
        source: data.
        trials, seconds: so many, each about so long with one at a time.
    """

    source: str
    trials: int
    seconds: float


def run(quick: bool) -> Result:
    """Figures: wall clock over the bare loop's, one at a time; throughput over two bare processes', two at a time."""
    cores = len(os.sched_getaffinity(0))
    setting = (
        Setting(source="phantom://mr-lesions?cases=12&size=32", trials=2, seconds=2.0)
        if quick
        else Setting(source="phantom://mr-lesions?cases=32&size=40", trials=8, seconds=60.0)
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = _prepare(setting, work)
        epochs = _epochs(recipe, setting, work, cores)
        half = setting.trials // 2
        first = _bare([half], threads=cores, epochs=epochs, work=work)
        tuned = _tune(setting, recipe, epochs, work, "one", at_once=1)
        second = _bare([half], threads=cores, epochs=epochs, work=work)
        bare = first.wall + second.wall - second.start_up  # one process would have started once
        pair_threads = max(1, cores // 2)
        tuned_pair = _tune(setting, recipe, epochs, work, "two", at_once=2)
        bare_pair = _bare([half, setting.trials - half], threads=pair_threads, epochs=epochs, work=work)
    figures = {
        "wall_over_bare": Figure(value=tuned / bare),
        "throughput_over_two_bare": Figure(value=bare_pair.wall / tuned_pair),
        "wall_one_at_a_time": Figure(value=tuned, unit="s"),
        "wall_two_at_a_time": Figure(value=tuned_pair, unit="s"),
    }
    targets = {
        "wall_over_bare": Target(op="<=", value=1.05),
        "throughput_over_two_bare": Target(op=">=", value=0.95),
    }
    peers = {
        "bare PyTorch": {
            "wall_one_at_a_time": Figure(value=bare, unit="s"),
            "wall_two_at_a_time": Figure(value=bare_pair.wall, unit="s"),
        }
    }
    notes = [
        f"{setting.trials} trials of {epochs} epochs and {VALIDATIONS} validations; {cores} threads with one at a "
        f"time, {pair_threads} each with two. Walls include the interpreter's start, imports and reading the data.",
        "Quick: start-up weighs most of it; only the full size says anything." if quick else "One run of each side.",
    ]
    return Result(figures=figures, targets={} if quick else targets, peers=peers, notes=notes)


# medray --------------------------------------------------------------------------------------------------------------


def _tune(setting: Setting, recipe: Recipe, epochs: int, work: Path, name: str, *, at_once: int) -> float:
    """Seconds from the start of ``medray tune`` to the end of its last trial."""
    space = work / f"{name}.yaml"
    study = {
        "name": name,
        # Trials are fixed in steps; the clock must cut none of them.
        "budget": max(600.0, 10 * setting.trials * setting.seconds),
        "trials": setting.trials,
        "pruner": "none",
        "sampler": "random",
        "search_share": 0.9,
        "concurrency": at_once,
    }
    # A study plans for the seconds that its trials have, and might take another network: all is given.
    planned = recipe.experiment().model_dump(mode="json")
    document = {
        **{section: planned[section] for section in (*recipe.explicit, "model", "loss", "optim", "preprocess")},
        "train": planned["train"] | _fixed(recipe, epochs),
        "defaults": ["_self_"],
        "data": setting.source,
        "study": study,
        "space": {"optim.lr": {"float": [min(LEARNING_RATES), max(LEARNING_RATES)], "log": True}},
    }
    space.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
    folder = work / "runs" / name
    log = work / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        began = time.monotonic()
        command = [sys.executable, "-m", "medray", "tune", str(space)]
        process = subprocess.Popen(command, cwd=work, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not _has_searched(folder):
                if process.poll() is not None:
                    said = log.read_text(encoding="utf-8")[-3000:]
                    raise RuntimeError(f"medray tune ended with {process.returncode} before its search did:\n{said}")
                time.sleep(0.05)
            wall = time.monotonic() - began
        finally:
            _interrupt(process)
    _check_completed(folder, setting.trials)
    _check_alike(folder, json.loads((work / "setup.json").read_text(encoding="utf-8")), epochs)
    return wall


def _has_searched(folder: Path) -> bool:
    try:
        return "search" in json.loads((folder / "clock.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError):
        return False


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check_completed(folder: Path, trials: int) -> None:
    from benchmarks.crash import read_trials

    states = [row.state for row in read_trials(folder).values()]
    if states != ["COMPLETE"] * trials:
        raise RuntimeError(f"the trials of {folder.name} are {states}, not {trials} completed ones: nothing to compare")


def _check_alike(folder: Path, setup: Mapping[str, Any], epochs: int) -> None:
    """Each trial trained the bare loop's network for as many steps."""
    import yaml

    for trial in sorted((folder / "trials").iterdir()):
        model = yaml.safe_load((trial / "experiment.yaml").read_text(encoding="utf-8"))["model"]
        steps = json.loads((trial / "result.json").read_text(encoding="utf-8"))["steps"]
        wanted = epochs * setup["steps_per_epoch"]
        if model != setup["model"] or steps != wanted:
            raise RuntimeError(f"{trial.name}: {model}, {steps} steps; bare: {setup['model']}, {wanted} steps")


# Bare ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bare:
    """Bare processes side by side: seconds until the last has ended, and of the first one's start."""

    wall: float
    start_up: float
    step: float


def _bare(counts: Sequence[int], *, threads: int, epochs: int, work: Path) -> Bare:
    """Run so many trials in each of ``len(counts)`` processes side by side."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    processes = []
    for count in counts:
        words = [str(work), "--trials", str(count), "--epochs", str(epochs), "--threads", str(threads)]
        command = [sys.executable, "-m", "benchmarks.overhead", *words]
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    wall = time.monotonic() - began
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"the bare loop ended with {codes}")
    row = json.loads(said[0].splitlines()[-1])
    return Bare(wall=wall, start_up=row["start_up"], step=row["step"])


def _loop(work: Path, trials: int, epochs: int, threads: int) -> None:
    """What a person would write by hand around the same network."""
    import torch

    from medray.config.schema import LossConfig, ModelConfig
    from medray.models.catalogue import build_model
    from medray.tasks.catalogue import build_loss
    from medray.train.precision import autocast, lay_out, memory_format, resolve_precision

    torch.set_num_threads(threads)
    setup = json.loads((work / "setup.json").read_text(encoding="utf-8"))
    data = torch.load(work / "tensors.pt", weights_only=True)
    device = torch.device("cpu")
    precision = resolve_precision("auto", device)
    batch, train, val = setup["batch"], setup["train"], setup["val"]
    begun = time.monotonic()
    start_up, steps = begun - STARTED, 0
    for trial in range(trials):
        torch.manual_seed(trial)
        model = build_model(
            ModelConfig.model_validate(setup["model"]),
            kind="segmentation",
            ndim=3,
            in_channels=data["image"].shape[1],
            num_outputs=setup["classes"],
            patch_size=tuple(setup["patch"]),
        )
        layout = memory_format(3, device, precision) if lay_out(model, device, precision) else torch.preserve_format
        criterion = build_loss(
            LossConfig.model_validate(setup["loss"]), kind="segmentation", num_classes=setup["classes"]
        )
        rate = LEARNING_RATES[trial % len(LEARNING_RATES)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * setup["steps_per_epoch"])
        best = -1.0
        for epoch in range(epochs):
            model.train()
            order = torch.tensor(train)[torch.randperm(len(train))].repeat(setup["samples_per_case"])
            for step in range(setup["steps_per_epoch"]):
                chosen = order[step * batch : (step + 1) * batch]
                images = data["image"][chosen].to(memory_format=layout)
                optimizer.zero_grad(set_to_none=True)
                with autocast(precision, device):
                    logits = model(images)
                loss = criterion(logits, data["mask"][chosen].long())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
                optimizer.step()
                scheduler.step()
                float(loss.detach())
                steps += 1
            if (epoch + 1) % setup["validate_every"] == 0:
                model.eval()
                with torch.inference_mode(), autocast(precision, device):
                    labels = torch.cat([model(data["image"][[i]].to(memory_format=layout)).argmax(1) for i in val])
                truth, found = data["mask"][val] == 1, labels == 1
                dice = 2.0 * float((truth & found).sum()) / max(1.0, float(truth.sum() + found.sum()))
                if dice >= best:
                    best = dice
                    torch.save(model.state_dict(), work / f"bare-{os.getpid()}.pt")
    print(json.dumps({"start_up": start_up, "step": (time.monotonic() - begun) / max(1, steps)}))


# Both ----------------------------------------------------------------------------------------------------------------


def _prepare(setting: Setting, work: Path) -> Recipe:
    """The plan for the data, and its tensors in a file for the bare loop."""
    import numpy as np
    import torch

    from medray.data.manifest import IGNORE
    from medray.workflows.planning import prepare_directory
    from medray.workflows.recipe import Recipe
    from medray.workflows.training import open_store

    directory = work / "data"
    prepare_directory(setting.source, directory)
    recipe = Recipe(directory=str(directory), explicit=SETTINGS, cache=str(work / "cache"))
    experiment = recipe.experiment()
    splits = recipe.splits(experiment)
    store = open_store(recipe, experiment)
    patch = experiment.train.patch_size
    if patch is None or any(size > most for size, most in zip(store.image(0).shape[1:], patch, strict=True)):
        raise RuntimeError(
            f"images of {store.image(0).shape[1:]}, patches of {patch}: choose a size that is taken whole"
        )
    # Padded as the loader pads.
    margin = [(0, most - size) for size, most in zip(store.image(0).shape[1:], patch, strict=True)]
    images = np.stack([np.pad(store.image(i), [(0, 0), *margin]).astype(np.float32) for i in range(len(store))])
    masks = np.stack([np.pad(np.asarray(store.mask(i)), margin, constant_values=IGNORE) for i in range(len(store))])
    torch.save({"image": torch.from_numpy(images), "mask": torch.from_numpy(masks)}, work / "tensors.pt")
    cases = len(splits.train) * experiment.train.samples_per_case
    setup = {
        "batch": experiment.train.batch_size,
        "patch": list(patch),
        "steps_per_epoch": math.ceil(cases / experiment.train.batch_size),
        "samples_per_case": experiment.train.samples_per_case,
        "train": list(splits.train),
        "val": list(splits.val),
        "classes": len(recipe.manifest.classes),
        "model": experiment.model.model_dump(mode="json"),
        "loss": experiment.loss.model_dump(mode="json"),
        "validate_every": 1,
    }
    (work / "setup.json").write_text(json.dumps(setup), encoding="utf-8")
    return recipe


def _epochs(recipe: Recipe, setting: Setting, work: Path, threads: int) -> int:
    """Epochs of a trial of the wanted length, from a short bare run; written into the bare loop's setup."""
    path = work / "setup.json"
    setup = json.loads(path.read_text(encoding="utf-8"))
    _check_length(recipe, setup["steps_per_epoch"])
    trial = _bare([1], threads=threads, epochs=2, work=work)
    epochs = round(setting.seconds / (trial.step * setup["steps_per_epoch"]))
    epochs = max(VALIDATIONS, VALIDATIONS * round(epochs / VALIDATIONS))
    path.write_text(json.dumps(setup | {"validate_every": epochs // VALIDATIONS}), encoding="utf-8")
    return epochs


def _fixed(recipe: Recipe, epochs: int) -> dict[str, Any]:
    return recipe.explicit["train"] | {"epochs": epochs, "validate_every": epochs // VALIDATIONS}


def _check_length(recipe: Recipe, steps_per_epoch: int) -> None:
    from medray.data.loader import train_loader
    from medray.workflows.training import open_store

    experiment = recipe.experiment()
    loader = train_loader(
        open_store(recipe, experiment),
        recipe.splits(experiment).train,
        experiment,
        kind=recipe.manifest.task,
        num_classes=len(recipe.manifest.classes),
    )
    if len(loader) != steps_per_epoch:
        raise RuntimeError(f"medray's epoch has {len(loader)} steps, the bare loop's {steps_per_epoch}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The bare loop, in a process of its own.")
    parser.add_argument("work", type=Path)
    for option in ("--trials", "--epochs", "--threads"):
        parser.add_argument(option, type=int, required=True)
    asked = parser.parse_args()
    _loop(asked.work, asked.trials, asked.epochs, asked.threads)
