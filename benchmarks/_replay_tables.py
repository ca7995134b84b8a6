"""The tables that :mod:`benchmarks.replay` replays: learning curves of every point of a grid, recorded on real data.

    python -m benchmarks.replay record classification    (segmentation2d, segmentation3d)

Small networks on small images, one thread. Seconds are of the processor, training and validation together, so that a
neighbour on the machine doesn't enter them. Every point has the same number of epochs and the same validations. A
recording that was interrupted goes on where it was.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._studies import work_folder, write_table
from benchmarks.common import FOLDER, machine, shared_data, versions

TABLES = FOLDER / "tables"
VALIDATIONS = 9
"""In a run, evenly spread: the first rungs of successive halving by three (1/9, 1/3) fall on one each."""
WHAT = ("images", "labels")
LR = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One point of the grid: seconds since its start and the objective, at each validation."""

    params: tuple[Any, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A recorded grid.

    Attributes:
        grid: path to its values, in order; numbers ascend.
        default: the plan's own experiment, moved to the nearest point.
    """

    name: str
    objective: str
    grid: dict[str, tuple[Any, ...]]
    default: tuple[Any, ...]
    curves: dict[tuple[Any, ...], Curve]

    @property
    def best(self) -> float:
        """The highest value of any validation."""
        return max(max(curve.values) for curve in self.curves.values())

    @property
    def seconds(self) -> float:
        """Of the whole grid, one after another."""
        return sum(curve.seconds[-1] for curve in self.curves.values())

    def nearest(self, params: Mapping[str, Any]) -> Curve:
        """The recorded point next to ``params``: by ratio for a rate, by difference for other numbers."""
        point = tuple(_nearest(values, params[path], path) for path, values in self.grid.items())
        return self.curves[point]


def _nearest(values: Sequence[Any], wanted: Any, path: str) -> Any:
    if not isinstance(values[0], float | int):
        return wanted
    if path in LOGARITHMIC:
        return min(values, key=lambda value: abs(math.log(value / wanted)))
    return min(values, key=lambda value: abs(value - wanted))


LOGARITHMIC = ("optim.lr", "model.feature_size", "optim.weight_decay")


def load(name: str, folder: Path = TABLES) -> Table:
    """A committed table."""
    raw = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    curves = {
        tuple(row[0]): Curve(params=tuple(row[0]), seconds=tuple(row[1]), values=tuple(row[2])) for row in raw["rows"]
    }
    return Table(
        name=name,
        objective=raw["objective"],
        grid={path: tuple(values) for path, values in raw["grid"].items()},
        default=tuple(raw["default"]),
        curves=curves,
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is recorded.

    Attributes:
        source: makes the data set below a folder; its path.
        fixed: fields of the experiment that are the same everywhere.
        grid: what varies.
        objective: of the validation.
    """

    source: Callable[[Path], Path]
    fixed: Mapping[str, Any]
    grid: Mapping[str, tuple[Any, ...]]
    objective: str
    about: str


def _breast(work: Path) -> Path:
    """BreastMNIST: 120 images to train on and 120 to validate, of its training and validation halves."""
    with np.load(shared_data() / "medmnist" / "breastmnist.npz", allow_pickle=False) as archive:
        pool = {what: np.concatenate([archive[f"{part}_{what}"] for part in ("train", "val")]) for what in WHAT}
    order = np.random.default_rng(0).permutation(len(pool["images"]))
    halves = {"train": order[:120], "val": order[120:240], "test": order[240:248]}
    path = work / "breast.npz"
    np.savez(path, **{f"{part}_{what}": pool[what][rows] for part, rows in halves.items() for what in WHAT})
    return path


def _drive(work: Path) -> Path:
    """The middle of DRIVE's training images, 64 px at a quarter of their resolution: 16 to train on, 4 to validate."""
    from PIL import Image

    rows, folder = [], shared_data() / "drive" / "training"
    for place, path in enumerate(sorted((folder / "images").iterdir())):
        number = path.stem.split("_")[0]
        mask = next((folder / "1st_manual").glob(f"{number}_*"))
        with Image.open(path) as picture, Image.open(mask) as drawn:
            half = 4 * 64 // 2
            middle = (picture.width // 2 - half, picture.height // 2 - half)
            box = (*middle, middle[0] + 2 * half, middle[1] + 2 * half)
            picture.convert("RGB").resize((64, 64), Image.Resampling.BOX, box).save(work / f"{number}.png")
            small = np.asarray(drawn.convert("L").resize((64, 64), Image.Resampling.BOX, box)) > 90
        Image.fromarray((small * 255).astype(np.uint8)).save(work / f"{number}-mask.png")
        split = "val" if place % 5 == 2 else "train"
        rows.append(
            {
                "image": str(work / f"{number}.png"),
                "mask": str(work / f"{number}-mask.png"),
                "patient": number,
                "split": split,
            }
        )
    return write_table(work / "drive.csv", rows)


def _hippocampus(work: Path) -> Path:
    """20 volumes of MSD hippocampus to train on and 6 to validate."""
    folder = shared_data() / "msd_hippocampus"
    names = json.loads((folder / "split.json").read_text(encoding="utf-8"))["train"][:26]
    rows = [
        {
            "image": str(folder / "imagesTr" / f"{name}.nii.gz"),
            "mask": str(folder / "labelsTr" / f"{name}.nii.gz"),
            "patient": name,
            "split": "train" if place < 20 else "val",
        }
        for place, name in enumerate(names)
    ]
    return write_table(work / "hippocampus.csv", rows)


COMMON: dict[str, Any] = {
    "device": "cpu",
    "train": {"loader_workers": 0, "precision": "fp32", "validate_every": 1},
    "split": {"test": 0.0},
}
SETTINGS = {
    "classification": Setting(
        about="BreastMNIST, 28 px: 120 training and 120 validation images; small_cnn",
        source=_breast,
        fixed={"model": {"name": "small_cnn"}, "train": {"epochs": VALIDATIONS, "batch_size": 16}},
        grid={
            "optim.lr": LR,
            "model.feature_size": (4, 8),
            "loss.label_smoothing": (0.0, 0.1, 0.2),
            "augment.strength": (0.0, 0.5, 1.0),
        },
        objective="val/auc",
    ),
    "segmentation2d": Setting(
        about="middle of DRIVE at a quarter of its resolution: 16 training and 4 validation images; U-Net of 2 levels",
        source=_drive,
        fixed={
            "model": {"name": "unet", "depth": 2, "deep_supervision": False},
            "train": {"epochs": VALIDATIONS, "batch_size": 4, "patch_size": [64, 64]},
            "inference": {"overlap": 0.0},
        },
        grid={
            "optim.lr": LR,
            "model.feature_size": (4, 6, 8),
            "loss.name": ("dice_ce", "tversky", "focal"),
            "augment.strength": (0.0, 0.7),
        },
        objective="val/dice",
    ),
    "segmentation3d": Setting(
        about="MSD hippocampus at 2.5 mm: 20 training and 6 validation volumes; U-Net of 2 levels",
        source=_hippocampus,
        fixed={
            "model": {"name": "unet", "depth": 2, "deep_supervision": False},
            "preprocess": {"spacing": [2.5, 2.5, 2.5]},
            "train": {"epochs": VALIDATIONS, "batch_size": 4, "patch_size": [16, 24, 16]},
            "inference": {"overlap": 0.0},
        },
        grid={
            "optim.lr": LR,
            "model.feature_size": (4, 6, 8),
            "loss.name": ("dice_ce", "tversky"),
            "augment.strength": (0.0, 0.5, 1.0),
        },
        objective="val/dice",
    ),
}


def record(name: str, folder: Path = TABLES, *, limit: int | None = None) -> Path:
    """Train every point of a grid that has not been trained yet, then write the table.

    Args:
        name: of :data:`SETTINGS`.
        folder: of the table.
        limit: points, for a look at what one costs.
    """
    import torch

    from medray.workflows.planning import prepare_directory
    from medray.workflows.recipe import Recipe, nest

    torch.set_num_threads(1)
    setting = SETTINGS[name]
    work = work_folder(False) / "replay" / name
    work.mkdir(parents=True, exist_ok=True)
    explicit = nest({})
    for tree in (COMMON, setting.fixed):
        for section, fields in tree.items():
            explicit[section] = {**explicit.get(section, {}), **fields} if isinstance(fields, dict) else fields
    if not (work / "fingerprint.json").exists():
        source = setting.source(work)
        prepare_directory(str(source), work, split=explicit["split"])
    recipe = Recipe(directory=str(work), explicit=explicit, cache=str(work / "cache"))
    done = work / "rows.jsonl"
    rows = [json.loads(line) for line in done.read_text(encoding="utf-8").splitlines()] if done.exists() else []
    known = {json.dumps(row[0]) for row in rows}
    points = list(itertools.product(*setting.grid.values()))
    np.random.default_rng(0).shuffle(points)  # type: ignore[arg-type]
    for place, point in enumerate(points[:limit]):
        plain = [_plain(value) for value in point]
        if json.dumps(plain) in known:
            continue
        curve = _train(recipe, dict(zip(setting.grid, plain, strict=True)), setting.objective)
        rows.append([plain, *curve])
        with done.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{name} {place + 1}/{len(points)} {plain}: {max(curve[1]):.4f}, {curve[0][-1]:.1f} s", flush=True)
    default = recipe.experiment().model_dump(mode="json")
    plain_default = {path: default[path.partition(".")[0]][path.partition(".")[2]] for path in setting.grid}
    # Where the plan leaves a width to the network, the widest recorded is the nearest to its own.
    nearest = [
        values[-1] if plain_default[path] is None else _nearest(values, plain_default[path], path)
        for path, values in setting.grid.items()
    ]
    document = {
        "about": setting.about,
        "objective": setting.objective,
        "recorded": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "grid": {path: list(values) for path, values in setting.grid.items()},
        "default": nearest,
    }
    text = (
        json.dumps(document, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _train(recipe: Any, params: Mapping[str, Any], objective: str) -> tuple[list[float], list[float]]:
    """Seconds and values of one run's validations; a run that diverged keeps its last value, or 0."""
    import torch

    from medray.data.loader import train_loader
    from medray.errors import NonFiniteLossError
    from medray.tasks.catalogue import build_loss
    from medray.train.fit import fit
    from medray.train.progress import Progress
    from medray.train.runtime import LocalRuntime
    from medray.workflows.judging import make_validate
    from medray.workflows.training import new_model, open_store

    experiment, manifest = recipe.experiment(params), recipe.manifest
    kind, classes, splits = manifest.task, len(manifest.classes), recipe.splits(experiment)
    store, runtime = open_store(recipe, experiment), LocalRuntime(torch.device("cpu"))
    validate = make_validate(store, splits.val, experiment, kind=kind, num_classes=classes, runtime=runtime)
    seconds: list[float] = []
    values: list[float] = []
    began = time.process_time()

    def validated(progress: Progress) -> bool:
        seconds.append(round(time.process_time() - began, 3))
        values.append(round(float(progress.metrics.get(objective, 0.0)), 5))
        return False

    try:
        fit(
            experiment,
            new_model(experiment, manifest),
            train_loader(store, splits.train, experiment, kind=kind, num_classes=classes),
            build_loss(experiment.loss, kind=kind, num_classes=classes),
            validate=validate,
            objective=(objective, "max"),
            runtime=runtime,
            on_validation=validated,
        )
    except NonFiniteLossError:
        spent, last = time.process_time() - began, values[-1] if values else 0.0
        while len(values) < VALIDATIONS:
            seconds.append(round(spent, 3))
            values.append(last)
    return seconds, values


def thread_limits() -> None:
    """One thread for every library that counts its own; to be called before they are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
