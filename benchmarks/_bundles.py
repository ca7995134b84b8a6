"""Bundles to measure on: one experiment trained for a short while, calibrated and exported as a study's champion is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def trained(work: Path, name: str, source: str, tree: dict[str, Any]) -> Path:
    """The folder of a bundle; one that is there already is not made again.

    Args:
        work: of the benchmark.
        name: of the run below it.
        source: the data.
        tree: fields of the experiment, over the plan.
    """
    from medray.bundle.spec import InferenceSpec
    from medray.bundle.write import write_bundle
    from medray.tasks.catalogue import find_task
    from medray.workflows import champion
    from medray.workflows.judging import spread
    from medray.workflows.planning import prepare_directory
    from medray.workflows.recipe import Recipe
    from medray.workflows.training import open_store, train_model

    directory = work / "bundles" / name
    if (directory / "bundle" / "bundle.json").is_file():
        return directory / "bundle"
    explicit = {"data": source, **tree}
    if not (directory / "manifest.json").is_file():
        prepare_directory(source, directory, split=explicit.get("split"))
    recipe = Recipe(directory=str(directory), explicit=explicit, cache=str(work / ".cache"))
    experiment, manifest = recipe.experiment(), recipe.manifest
    network = train_model(recipe, experiment, directory / "run")
    candidate, splits = champion.Candidate(name="it", members=(network,)), recipe.splits(experiment)
    metric = find_task(manifest.task).objective[0].removeprefix("val/")
    temperature = champion.temperature_of(
        champion.score(recipe, [candidate], spread(splits.val, 64), metric=metric)["it"]
    )
    store, patch = open_store(recipe, experiment), experiment.train.patch_size
    arrays = [np.asarray(store.image(index), dtype=np.float32) for index in spread(splits.val, 4)]
    segmentation = manifest.task == "segmentation"
    write_bundle(
        directory / "bundle",
        kind=manifest.task,
        ndim=manifest.ndim,
        channels=manifest.channels,
        classes=manifest.classes,
        modality=manifest.modality,
        name=name,
        preprocess=experiment.preprocess,
        inference=InferenceSpec(
            patch_size=patch if segmentation else None,
            divisor=champion.divisor_of(candidate, manifest.ndim),
            overlap=experiment.inference.overlap,
            batch_size=1,
        ),
        models=[network.model],
        configs=[experiment.model],
        temperature=temperature,
        golden=np.stack([_window(array, patch) if segmentation else array for array in arrays]),
        experiment=experiment,
        fingerprint=recipe.fingerprint,
    )
    return directory / "bundle"


def _window(array: Any, patch: tuple[int, ...] | None) -> Any:
    """The middle of an image (C, *s), padded to a window."""
    if patch is None:
        return array
    slots, widths = [slice(None)], [(0, 0)]
    for n, size in zip(array.shape[1:], patch, strict=True):
        start, more = max(0, (n - size) // 2), max(0, size - n)
        slots.append(slice(start, start + min(n, size)))
        widths.append((more // 2, more - more // 2))
    return np.pad(array[tuple(slots)], widths)
