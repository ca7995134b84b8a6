"""Makes ``medray/search/portfolio.json``: what won on phantoms and public data, for new studies to try first.

    python -m benchmarks._portfolio                  search on each set below, then write the file
    python -m benchmarks._portfolio --runs DIR       and take in the studies of DIR that ended, too

A search is one process, one trial at a time, over what the shipped spaces vary but the network, each trial with the
same few epochs. Searches that have ended are read, not run again. Only sets that anybody may know of belong here: a
fingerprint names classes and counts sites.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks._replay_tables import thread_limits
from benchmarks._studies import work_folder
from benchmarks.common import ROOT, shared_data

TRIALS = 9
KEPT = 3
"""Of one data set."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set to search on.

    Attributes:
        data: as medray takes it; ``{shared}`` is the folder of real data.
        space: file of ``search_spaces/`` whose parameters vary.
        fields: of the experiment, the same in all trials.
    """

    data: str
    space: str
    fields: Mapping[str, Any]


SOURCES = {
    "xray-nodules (phantom)": Source(
        data="phantom://xray-nodules?cases=160&size=32", space="cls.yaml", fields={"train": {"epochs": 18}}
    ),
    "BreastMNIST": Source(data="{shared}/medmnist/breastmnist.npz", space="cls.yaml", fields={"train": {"epochs": 9}}),
    "fundus-vessels (phantom)": Source(
        data="phantom://fundus-vessels?cases=24&size=64", space="seg.yaml", fields={"train": {"epochs": 18}}
    ),
    "ct-lesions (phantom)": Source(
        data="phantom://ct-lesions?cases=20&size=24", space="seg3d.yaml", fields={"train": {"epochs": 18}}
    ),
}


def search(name: str, source: Source, work: Path) -> Any:
    """One search; what it found as a ``Past``, None where nothing beat the default."""
    from medray.config.compose import compose
    from medray.config.schema import StudyConfig
    from medray.search.driver import StudyDriver
    from medray.search.past import Past, Tried
    from medray.search.space import Space
    from medray.tasks.catalogue import find_task
    from medray.workflows.planning import prepare_directory
    from medray.workflows.recipe import Recipe
    from medray.workflows.trial import TrialPayload, run_trial

    folder = work / name.split(" ")[0]
    composed = compose(ROOT / "search_spaces" / source.space, [])
    space = Space.parse({path: rule for path, rule in composed.space.items() if path != "model.name"})
    explicit = {**composed.explicit, **source.fields, "data": source.data, "device": "cpu"}
    if not (folder / "fingerprint.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare_directory(source.data.format(shared=shared_data()), folder)
    recipe = Recipe(directory=str(folder), explicit=explicit, cache=str(folder / "cache"))
    objective, direction = find_task(recipe.manifest.task).objective
    tree = recipe.experiment().model_dump(mode="json")
    default = {parameter.path: _field(tree, parameter.path) for parameter in space}
    config = StudyConfig(trials=TRIALS, pruner="asha")
    with StudyDriver(space, config, {objective: direction}, folder, default) as driver:
        while (task := driver.ask()) is not None:
            task = _with_payload(task, TrialPayload(recipe=recipe, objective=(objective, direction)))

            def report(told: Any, number: int = task.number) -> bool:
                return driver.report(number, told["step"], told["fraction"], told["metrics"], seconds=told["seconds"])

            outcome = run_trial(task, report)
            driver.complete(task.number, outcome)
            print(
                f"{name}, trial {task.number}: {dict(outcome.metrics).get(objective):.4f} {outcome.stopped}", flush=True
            )
        records = driver.records()
    sign = 1.0 if direction == "max" else -1.0
    ended = [record for record in records if record.values is not None]
    base = next(record.metrics[objective] for record in ended if record.is_default)
    gains = sorted((sign * (r.metrics[objective] - base), r.number, r.params) for r in ended if not r.is_default)
    best = tuple(Tried(params=dict(params), gain=round(gain, 5)) for gain, _, params in gains[::-1] if gain > 0)[:KEPT]
    return (
        Past(name=name, objective=objective, direction=direction, fingerprint=recipe.fingerprint, best=best)
        if best
        else None
    )


def _field(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        value = value[part] if isinstance(value, Mapping) else None
    return value


def _with_payload(task: Any, payload: Any) -> Any:
    from dataclasses import replace

    return replace(task, payload=payload)


def main() -> None:
    """Search on what has not been searched on yet, and write the file anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._portfolio", description=__doc__)
    parser.add_argument("--runs", type=Path, action="append", default=[], help="a folder with studies that ended")
    parser.add_argument("--only", action="append", choices=list(SOURCES), help="these sets alone")
    asked = parser.parse_args()
    thread_limits()
    import torch

    torch.set_num_threads(1)
    from medray.search.past import PORTFOLIO, Portfolio, studies_in

    work = work_folder(False) / "portfolio"
    found = [search(name, SOURCES[name], work) for name in asked.only or SOURCES]
    found += [study for folder in asked.runs for study in studies_in(folder)]
    studies = tuple(study for study in found if study is not None)
    Portfolio(studies=studies).save(PORTFOLIO)
    print(yaml.safe_dump({study.name: [dict(t) for t in study.best] for study in studies}, sort_keys=False))


if __name__ == "__main__":
    main()
