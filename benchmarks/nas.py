"""Are searched networks better than random ones of the same size, and than the hand-made default, retrained alike?

DARTS and ENAS search once on the training cases of PneumoniaMNIST and of DRIVE. What they found, five random genotypes
of about as many parameters, and the plan's default are then trained with the same seconds, settings and seeds, and
measured on the test cases, which nothing was chosen by. A run that has ended is read, not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from benchmarks import drive
from benchmarks._studies import work_folder
from benchmarks.common import Figure, Result, Target, over_seeds, shared_data

if TYPE_CHECKING:
    from medray.workflows.recipe import Recipe

SEEDS, RANDOM = 3, 5
SECONDS, SEARCH_SECONDS = 22.0, 150.0
"""Of a training, and of a search: 48 and 4 of them, with their scoring some 40 minutes on two quiet cores."""
QUICK_SECONDS, QUICK_STEPS = 2.0, 1
ALIKE = 0.25
"""How far a random genotype may be below the smaller, or above the larger of the searched ones, in parameters."""
STRATEGIES = ("darts", "enas")
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set: of (work folder, quick) its source, and the metric of its test cases."""

    source: Callable[[Path, bool], str]
    metric: str


def _archive(_work: Path, quick: bool) -> str:
    """In --quick BreastMNIST, an eighth of the images to check."""
    return str(shared_data() / "medmnist" / f"{'breastmnist' if quick else 'pneumoniamnist'}.npz")


CASES = {
    "pneumonia": Case(source=_archive, metric="auc"),
    "drive": Case(source=lambda work, _quick: str(drive.cases(shared_data() / "drive", work)), metric="dice"),
}


def run(quick: bool) -> Result:
    """Figures: each network's test metric, and how far searched ones lie above the mean of random, and the default."""
    work = work_folder(quick) / "nas"
    work.mkdir(exist_ok=True)
    figures: dict[str, Figure] = {}
    targets: dict[str, Target] = {}
    notes: list[str] = []
    seeds = 1 if quick else SEEDS
    for name, case in CASES.items():
        bench = _Bench(name, case, work, quick)
        networks = bench.networks()
        found = {network: [bench.measure(network, model, seed) for seed in range(seeds)] for network, model in networks}
        random = [mean(values) for values in zip(*(found[n] for n in found if n.startswith("random")), strict=True)]
        figures[f"{name}: random, {case.metric}"] = over_seeds(random)
        for network in (*STRATEGIES, DEFAULT):
            figures[f"{name}: {network}, {case.metric}"] = over_seeds(found[network])
        for network in STRATEGIES:
            gains = [own - other for own, other in zip(found[network], random, strict=True)]
            key = f"{name}: {network} over random"
            figures[key] = over_seeds(gains)
            if not quick:
                targets[key] = Target(op=">=", value=0.0)
            over = [own - other for own, other in zip(found[network], found[DEFAULT], strict=True)]
            figures[f"{name}: {network} over default"] = over_seeds(over)
        notes.append(bench.note(networks, seeds))
    notes.append("Intervals are those of the mean over seeds (Student's t); differences are paired by seed.")
    return Result(figures=figures, targets=targets, notes=notes)


class _Bench:
    """One data set: prepared once, searched once by each strategy, trained on once for each network and seed."""

    def __init__(self, name: str, case: Case, work: Path, quick: bool) -> None:
        self.name, self.case, self.quick = name, case, quick
        self.seconds = QUICK_SECONDS if quick else SECONDS
        self.folder = work / name
        self.recipe = self._prepared(case.source(work, quick))
        self.searched: list[str] = []

    def _prepared(self, source: str) -> Recipe:
        from medray.workflows.planning import prepare_directory
        from medray.workflows.recipe import Recipe

        directory = self.folder / "data"
        if not (directory / "fingerprint.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            prepare_directory(source, directory)
        return Recipe(directory=str(directory), explicit={"data": source}, cache=str(self.folder.parent / "cache"))

    def networks(self) -> list[tuple[str, str | None]]:
        """Name and model of all that are compared; None is the plan's own."""
        found = [(strategy, self._search(strategy)) for strategy in STRATEGIES]
        rivals = self._random([model for _, model in found], 1 if self.quick else RANDOM)
        return [*found, *((f"random-{number}", model) for number, model in enumerate(rivals)), (DEFAULT, None)]

    def _search(self, strategy: str) -> str:
        import torch

        from medray.config.schema import NasConfig
        from medray.workflows.architecture import SearchTask, run_search

        nas = NasConfig(strategy=strategy, steps=QUICK_STEPS if self.quick else None)
        found = run_search(
            SearchTask(
                recipe=self.recipe,
                nas=nas,
                directory=str(self.folder / strategy),
                seconds=SEARCH_SECONDS,
                cpus=torch.get_num_threads(),
            )
        )
        self.searched.append(f"{strategy} took {found.steps} steps in {found.seconds:.0f} s")
        return found.genotypes[0].name

    def _random(self, models: list[str], count: int) -> list[str]:
        """The first genotypes by lot that are about as large as the searched ones."""
        from medray.config.schema import NasConfig
        from medray.search.nas.draw import random_genotype
        from medray.workflows.architecture import kind_of

        sizes = [self._parameters(model) for model in models]
        least, most = (1 - ALIKE) * min(sizes), (1 + ALIKE) * max(sizes)
        found: list[str] = []
        seed = 0
        while len(found) < count:
            seed += 1
            model = random_genotype(kind_of(self.recipe.manifest), NasConfig().nodes, seed).name
            if least <= self._parameters(model) <= most:
                found.append(model)
            if seed == 20_000:
                raise RuntimeError(f"no {count} random genotypes of {least:.0f} to {most:.0f} parameters")
        return found

    def _parameters(self, model: str | None) -> int:
        import torch

        from medray.workflows.training import new_model

        experiment = self.recipe.experiment({} if model is None else {"model.name": model})
        with torch.device("meta"):
            network = new_model(experiment, self.recipe.manifest)
        return sum(parameter.numel() for parameter in network.parameters())

    def measure(self, network: str, model: str | None, seed: int) -> float:
        """The metric of the test cases after a training, unless that has been done."""
        from medray.tracking import NullTracker
        from medray.workflows.champion import Candidate, score
        from medray.workflows.training import train_model

        directory = self.folder / f"{network}-{seed}"
        path = directory / "test.json"
        if not path.exists():
            begun = time.monotonic()
            params = {} if model is None else {"model.name": model}
            experiment = self.recipe.experiment(params, budget=self.seconds, twin=seed)
            trained = train_model(self.recipe, experiment, directory, tracker=NullTracker())
            cases = self.recipe.splits(experiment).test[: 4 if self.quick and self.name == "drive" else None]
            candidate = Candidate(name=network, members=(trained,))
            value = score(self.recipe, [candidate], cases, metric=self.case.metric)[network].value
            path.write_text(json.dumps(value), encoding="utf-8")
            spent = time.monotonic() - begun
            print(f"{self.name}, {network}, seed {seed}: {self.case.metric} {value:.4f}, {spent:.0f} s", flush=True)
        return float(json.loads(path.read_text(encoding="utf-8")))

    def note(self, networks: list[tuple[str, str | None]], seeds: int) -> str:
        """What was compared."""
        sizes = {network: self._parameters(model) for network, model in networks}
        random = [size for network, size in sizes.items() if network.startswith("random")]
        planned = self.recipe.experiment().model.name
        return (
            f"{self.name}: {self.seconds:.0f} s a training, {seeds} seed(s); {'; '.join(self.searched)}; parameters: "
            f"darts {sizes['darts']:,}, enas {sizes['enas']:,}, {len(random)} random {min(random):,} to "
            f"{max(random):,}, {planned} {sizes[DEFAULT]:,}."
        )
