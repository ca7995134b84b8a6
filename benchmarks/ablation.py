"""What does each option of the training strategy bring, alone, over the planned default?

PneumoniaMNIST (2-D) and MSD hippocampus (3-D), the same seconds for every run, several seeds. Judged on the validation
cases alone, which also chose each run's weights: no test case is opened. A difference is paired by seed and case; its
interval comes from drawing seeds and cases anew, both with replacement. A run that has ended is read, not run again.

``MEDRAY_ABLATION_SECONDS`` sets the seconds of a run, on both sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks import hippocampus as hippocampus_benchmark
from benchmarks._studies import work_folder
from benchmarks.common import Figure, Result, shared_data

if TYPE_CHECKING:
    from medray.config.schema import Experiment
    from medray.workflows.recipe import Recipe
    from medray.workflows.training import Trained

SEEDS = 3
DRAWS = 400
Params = Mapping[str, Any]
Array = npt.NDArray[Any]

BOTH: dict[str, Params] = {
    "no augmentation": {"augment.strength": 0.0},
    "half the augmentation": {"augment.strength": 0.5},
    "adaptive augmentation": {"augment.adaptive": True},
    "no EMA": {"train.ema": 0.0},
    "layer decay .8": {"optim.layer_decay": 0.8},
    "SAM, rho .05": {"optim.sam_rho": 0.05},
}
FROM_ELSEWHERE: dict[str, Params] = {
    "pretrained elsewhere": {},
    "pretrained elsewhere, layer decay .8": {"optim.layer_decay": 0.8},
    "pretrained elsewhere, 2 epochs frozen": {"train.freeze_epochs": 2},
}
CLASSIFIER: dict[str, Params] = {
    "no label smoothing": {"loss.label_smoothing": 0.0},
    "label smoothing .1": {"loss.label_smoothing": 0.1},
    "balanced sampling": {"train.balanced": True},
    "mixup .2": {"train.mixup": 0.2},
    "CutMix 1": {"train.cutmix": 1.0},
    "no dropout": {"model.dropout": 0.0},
    "stochastic depth .1": {"model.drop_path": 0.1},
    "heteroscedastic": {"loss.name": "heteroscedastic"},
}
SMALL_PATCH = (24, 32, 24)
"""About a quarter of the volume: where a patch holds all of it, there is nothing to centre on the foreground."""
SEGMENTER: dict[str, Params] = {
    "label smoothing .05": {"loss.label_smoothing": 0.05},
    "dropout .1, single values": {"model.dropout": 0.1, "model.dropout_kind": "standard"},
    "dropout .1, places": {"model.dropout": 0.1, "model.dropout_kind": "spatial"},
    "dropout .1, channels": {"model.dropout": 0.1, "model.dropout_kind": "channel"},
    "heteroscedastic": {"loss.name": "dice_heteroscedastic"},
    "small patches": {"train.patch_size": SMALL_PATCH, "train.samples_per_case": 2, "train.foreground": 0.0},
    "small patches, half on foreground": {
        "train.patch_size": SMALL_PATCH,
        "train.samples_per_case": 2,
        "train.foreground": 0.5,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set to try the options on.

    Attributes:
        source: of (work folder, quick) to what medray reads as data.
        elsewhere: data that the same network is trained on first, for the options that start from given weights.
        metric: of the validation cases.
        seconds: of a run, on two quiet cores.
        options: beside the default.
        left_out: options that can't apply here, and why.
    """

    source: Callable[[Path, bool], str]
    elsewhere: Callable[[Path, bool], str]
    metric: str
    seconds: float
    options: Mapping[str, Params]
    left_out: Mapping[str, str]


def _archive(name: str) -> Callable[[Path, bool], str]:
    """In --quick always BreastMNIST, an eighth of the images to check."""
    return lambda _work, quick: str(shared_data() / "medmnist" / f"{'breastmnist' if quick else name}.npz")


def _hippocampus(work: Path, quick: bool) -> str:
    return str(hippocampus_benchmark.cases(shared_data() / "msd_hippocampus", work, limit=12 if quick else None))


CASES = {
    "pneumonia": Case(
        source=_archive("pneumoniamnist"),
        elsewhere=_archive("breastmnist"),
        metric="auc",
        seconds=20.0,
        options=BOTH | CLASSIFIER | FROM_ELSEWHERE,
        left_out={
            "dropout of places or channels": "the planned classifier drops after pooling, where there are none",
            "foreground sampling": "it is for segmentation",
        },
    ),
    "hippocampus": Case(
        source=_hippocampus,
        elsewhere=lambda _work, quick: f"phantom://mr-lesions?cases={8 if quick else 60}&size=40",
        metric="dice",
        seconds=50.0,
        options=BOTH | SEGMENTER | FROM_ELSEWHERE,
        left_out={
            "mixup, CutMix, balanced sampling": "they are for classification",
            "stochastic depth": "the planned U-Net has no residual branches",
        },
    ),
}
QUICK_OPTIONS = {"pneumonia": ("SAM, rho .05",), "hippocampus": ("heteroscedastic",)}
QUICK_SECONDS = 2.0


def run(quick: bool) -> Result:
    """Figures: the default's validation metric, and by option what it adds, with the interval of the difference."""
    work = work_folder(quick) / "ablation"
    work.mkdir(exist_ok=True)
    figures: dict[str, Figure] = {}
    notes: list[str] = []
    seeds, draws = (1, 100) if quick else (SEEDS, DRAWS)
    for name, case in CASES.items():
        seconds = float(os.environ.get("MEDRAY_ABLATION_SECONDS", QUICK_SECONDS if quick else case.seconds))
        options = {"default": {}} | {
            option: params for option, params in case.options.items() if not quick or option in QUICK_OPTIONS[name]
        }
        bench = _Bench(name, case, work, quick, seconds)
        found = {
            option: [bench.validate(option, params, seed) for seed in range(seeds)]
            for option, params in options.items()
        }
        default = found.pop("default")
        figures[f"{name}: default, {case.metric}"] = _absolute(bench, default, draws)
        for option, rows in found.items():
            figures[f"{name}: {option}"] = _difference(bench, rows, default, draws)
        notes.append(
            f"{name}: {seconds:.0f} s a run, {seeds} seed(s), {bench.cases} validation cases, {bench.network}; "
            "left out: " + "; ".join(f"{what} ({why})" for what, why in case.left_out.items()) + "."
        )
    notes.append(
        "Each row is the option's metric minus the default's. Weights are chosen on the cases that judge them, alike "
        "on both sides. SAM has half the steps in the same seconds."
    )
    return Result(figures=figures, notes=notes)


Rows = tuple[Array, ...]
"""What a run says of the validation cases, a row each: Dice by class; or targets and probabilities."""


class _Bench:
    """One data set: prepared once, trained on once for each option and seed."""

    def __init__(self, name: str, case: Case, work: Path, quick: bool, seconds: float) -> None:
        self.name, self.case, self.seconds = name, case, seconds
        self._folder, self._quick = work / f"{name}-{seconds:g}s", quick
        self.recipe = self._prepared(case.source(work, quick), self._folder / "data")
        self._given: Path | None = None
        experiment = self.recipe.experiment(budget=seconds)
        self.cases = len(self.recipe.splits(experiment).val)
        self.network = experiment.model.name

    def validate(self, option: str, params: Params, seed: int) -> Rows:
        """Train, unless it has been done, and judge."""
        if option in FROM_ELSEWHERE:
            params = {**params, "model.pretrained": str(self._weights())}
        experiment = self.recipe.experiment(params, budget=self.seconds, twin=seed)
        directory = self._folder / f"{option.replace(' ', '-').replace(',', '')}-{seed}"
        path = directory / "validation.npz"
        if not path.exists():
            begun = time.monotonic()
            trained = _train(self.recipe, experiment, directory)
            rows = _judge(self.recipe, trained)
            partial = path.with_suffix(".part.npz")
            np.savez(partial, *rows)
            partial.replace(path)
            print(
                f"{self.name}, {option}, seed {seed}: {trained.headline}, {time.monotonic() - begun:.0f} s", flush=True
            )
        with np.load(path, allow_pickle=False) as archive:
            return tuple(archive[key] for key in archive.files)

    def measure(self, rows: Rows) -> float:
        """The metric of some cases."""
        from medray.tasks.catalogue import find_task

        return find_task(self.recipe.manifest.task).measure(self.case.metric, *rows)

    def _weights(self) -> Path:
        """Of the default's network, trained on other data for as long."""
        if self._given is None:
            recipe = self._prepared(self.case.elsewhere(self._folder, self._quick), self._folder / "elsewhere-data")
            own = self.recipe.experiment(budget=self.seconds)
            params: dict[str, Any] = {
                f"model.{key}": value for key, value in own.model.model_dump().items() if value is not None
            }
            params |= {"train.patch_size": own.train.patch_size, "preprocess.size": own.preprocess.size}
            directory = self._folder / "elsewhere"
            _train(recipe, recipe.experiment(params, budget=self.seconds), directory)
            self._given = directory / "weights.safetensors"
        return self._given

    def _prepared(self, source: str, directory: Path) -> Recipe:
        from medray.workflows.planning import prepare_directory
        from medray.workflows.recipe import Recipe

        if not (directory / "fingerprint.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            prepare_directory(source, directory)
        return Recipe(directory=str(directory), explicit={"data": source}, cache=str(self._folder.parent / "cache"))


def _train(recipe: Recipe, experiment: Experiment, directory: Path) -> Trained:
    from medray.tracking import NullTracker
    from medray.workflows.training import train_model

    return train_model(recipe, experiment, directory, tracker=NullTracker())


def _judge(recipe: Recipe, trained: Trained) -> Rows:
    import torch

    from medray.learn.metrics import dice_per_class
    from medray.predict.predictor import probabilities
    from medray.predict.sliding import classify
    from medray.workflows.judging import predictor_of, segment_prepared
    from medray.workflows.training import open_store

    experiment, manifest = trained.experiment, recipe.manifest
    store, cases = open_store(recipe, experiment), recipe.splits(experiment).val
    predictor = predictor_of(trained.model, experiment, torch.device("cpu"))
    if manifest.task == "segmentation":
        dice = []
        for index in cases:
            labels = segment_prepared(predictor, store.image(index), experiment).argmax(axis=0)
            dice.append(dice_per_class(labels, np.asarray(store.mask(index)), len(manifest.classes)))
        return (np.stack(dice),)
    images = np.stack([np.asarray(store.image(index), dtype=np.float32) for index in cases])
    logits = classify(predictor, images)
    return np.asarray([store.label(index) for index in cases]), probabilities(logits, manifest.task)


def _absolute(bench: _Bench, runs: list[Rows], draws: int) -> Figure:
    return _interval(lambda seeds, cases: _mean(bench, runs, seeds, cases), runs, draws)


def _difference(bench: _Bench, runs: list[Rows], others: list[Rows], draws: int) -> Figure:
    def statistic(seeds: Array, cases: Array) -> float:
        return _mean(bench, runs, seeds, cases) - _mean(bench, others, seeds, cases)

    return _interval(statistic, runs, draws)


def _mean(bench: _Bench, runs: list[Rows], seeds: Array, cases: Array) -> float:
    """Over seeds, of the metric of the cases drawn."""
    return float(np.mean([bench.measure(tuple(array[cases] for array in runs[seed])) for seed in seeds]))


def _interval(statistic: Callable[[Array, Array], float], runs: list[Rows], draws: int) -> Figure:
    """Percentiles over draws of seeds and of cases. One seed says nothing of how seeds vary."""
    count = len(runs[0][0])
    rng = np.random.default_rng(0)
    found = [statistic(rng.integers(len(runs), size=len(runs)), rng.integers(count, size=count)) for _ in range(draws)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    value = statistic(np.arange(len(runs)), np.arange(count))
    return Figure(value=value, low=float(low), high=float(high))
