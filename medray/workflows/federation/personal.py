"""A site's own model, where some weights stay at the sites: the shared ones and its own, as a bundle that stays too.

Nobody else could write it: the server has never seen a site's own weights, and other sites' don't fit.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from medray.config.schema import Experiment
from medray.data.fingerprint import measure
from medray.data.splits import Splits
from medray.errors import FederationError
from medray.learn.intervals import Interval
from medray.tasks.catalogue import find_task
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate, Scores
from medray.workflows.packing import write_champion
from medray.workflows.recipe import Recipe
from medray.workflows.training import Network

__all__ = ["settled", "write_own"]


def settled(directory: Path, digest: str) -> bool:
    """Whether the bundle of a run is there already; of which weights it is made is settled by who asks first.

    Args:
        directory: of the bundle; its digest lies beside it.
        digest: of the last shared weights.

    Raises:
        FederationError: it was made of others: a later message replaces no finished model.
    """
    mark = directory.with_name(f"{directory.name}.sha256")
    if mark.is_file():
        if mark.read_text(encoding="utf-8").strip() != digest:
            raise FederationError(
                "this site's own model of this run was made of other weights, and stays as it is. Begin a new "
                "federation for another"
            )
        return directory.is_dir()
    mark.parent.mkdir(parents=True, exist_ok=True)
    partial = mark.with_name(f"{mark.name}.part")
    partial.write_text(f"{digest}\n", encoding="utf-8")
    partial.replace(mark)
    return False


def write_own(
    directory: Path, site: Path, cache: str, *, name: str, model: nn.Module, experiment: Experiment, splits: Splits
) -> str:
    """Write the bundle of a site's own model.

    It is calibrated on the site's validation cases and measured on its test cases, or, where it has none, on the former
    (then the card calls it optimistic). Under differential privacy of the training neither is done, so that its answers
    are as private as the weights. Its card, with the fingerprint of the data, is not, and says so.

    Args:
        directory: of the bundle.
        site: folder of the site, with ``manifest.json``; what was measured on its data is kept there, too.
        cache: of prepared cases.
        name: of the site.
        model: whole, with the last shared weights and the site's own.
        experiment: of the run.
        splits: of the site's cases.

    Returns:
        what it came to, in words, for the site's owner.
    """
    recipe = Recipe(directory=str(site), explicit={}, cache=cache)
    measure(recipe.manifest).save(site / "fingerprint.json")  # of today's data, for the card
    metric = find_task(recipe.manifest.task).objective[0].removeprefix("val/")
    candidate = Candidate(name="own", members=(Network(model=model.eval(), experiment=experiment),))
    federation, temperature = experiment.federation, 1.0
    validation: Scores | None = None
    metrics: dict[str, Interval] = {}
    notes = [
        f"Trained by {federation.strategy} in {federation.rounds} rounds; some weights are of {name} alone, and fit no "
        "other site"
    ]
    cases = splits.test or splits.val
    if cases and not experiment.privacy.on:
        if splits.val:
            validation = choosing.score(recipe, [candidate], list(splits.val), metric=metric)["own"]
            temperature = choosing.temperature_of(validation)
        metrics = choosing.score(recipe, [candidate], list(cases), metric=metric)["own"].intervals()
        notes.append(f"Measured on {len(cases)} {'test' if splits.test else 'validation (optimistic)'} cases of {name}")
    else:
        notes.append("Neither calibrated nor measured: that would not be private, or there were no cases")
    if experiment.privacy.on:
        notes.append("The weights are differentially private. What this card says of the data is exact: it is not")
    write_champion(
        directory,
        recipe,
        candidate,
        validation,
        name=f"{name}-own",
        temperature=temperature,
        metrics=metrics,
        notes=notes,
    )
    value = metrics[metric].value if metric in metrics else math.nan
    return f"its own model is {directory}" + (f" ({metric} {value:.3f})" if math.isfinite(value) else "")
