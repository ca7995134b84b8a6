"""What would be unsound under differential privacy: refused with the field and the fix, or kept out of the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from medray.config.schema import Experiment
from medray.errors import PrivacyError
from medray.tasks.catalogue import find_task

__all__ = ["PASSES", "adapted", "check_private", "private_layer"]

Tree = dict[str, Any]

PASSES = 30
"""Epochs where nobody asked for more: under a fixed epsilon every further step costs noise in all of them."""


def private_layer(plan: Mapping[str, Any]) -> Tree:
    """What a plan made for ordinary training has to give up, as a layer over it and under what the user set.

    Args:
        plan: the plan's tree.
    """
    layer: Tree = {
        "model": {"norm": "group"},
        "loss": {"batch_dice": False, "class_weights": None},
        "augment": {"adaptive": False},
        "train": {
            "budget": None,
            "checkpointing": "off",
            "mixup": 0.0,
            "cutmix": 0.0,
            "balanced": False,
            "patience": None,
            "precision": "fp32",
        },
    }
    if (plan.get("preprocess") or {}).get("normalize") == "ct":
        # Percentiles, mean and deviation of the data set were measured on private images; each image's own were not.
        layer["preprocess"] = {"normalize": "zscore", "clip": None, "mean": None, "std": None}
    epochs = (plan.get("train") or {}).get("epochs")
    if epochs is not None:
        layer["train"]["epochs"] = min(epochs, PASSES)
    return layer


def adapted(plan: Mapping[str, Any], explicit: Mapping[str, Any]) -> list[Tree]:
    """The layers of a private experiment: the plan, what privacy takes from it, and what the user chose.

    A value in the user's file that is the plan's own (a plan was written out and handed back), or the schema's default,
    was not chosen, and gives way; any other is kept, and :func:`check_private` judges it.

    Raises:
        PrivacyError: ``ct`` normalisation was asked for without constants of its own.
    """
    if (explicit.get("privacy") or {}).get("epsilon") is None:
        return [dict(plan), dict(explicit)]
    layer = private_layer(plan)
    default = Experiment().model_dump(mode="json")
    kept: Tree = {}
    for section, fields in explicit.items():
        if not isinstance(fields, Mapping) or section not in layer:
            kept[section] = fields
            continue
        usual = {**default.get(section, {}), **(plan.get(section) or {})}
        kept[section] = {
            name: value
            for name, value in fields.items()
            if name not in layer[section] or _plain(value) != _plain(usual.get(name))
        }
    _refuse_measured(kept.get("preprocess") or {})
    return [dict(plan), layer, kept]


def _refuse_measured(preprocess: Mapping[str, Any]) -> None:
    missing = [name for name in ("clip", "mean", "std") if preprocess.get(name) is None]
    if preprocess.get("normalize") == "ct" and missing:
        raise PrivacyError(
            f"preprocess.normalize=ct would take {', '.join(f'preprocess.{name}' for name in missing)} from private "
            "images. Give public constants for them, or set preprocess.normalize=zscore: it looks at each image alone"
        )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def check_private(experiment: Experiment, *, kind: str) -> None:
    """Refuse an experiment that would not be as private as it says; does nothing where none was asked for.

    Args:
        kind: of the task.

    Raises:
        PrivacyError: names every field that is in the way, and what to set instead.
    """
    if not experiment.privacy.on:
        return
    train, loss = experiment.train, experiment.loss
    form = find_task(kind).target
    weighted = loss.class_weights is not None and form == "class" and loss.name != "bce"
    over_batch = (
        loss.batch_dice and loss.name in ("dice", "dice_ce", "dice_heteroscedastic", "tversky") and form == "mask"
    )
    precise = train.precision in ("auto", "fp32")
    wrong = [
        (over_batch, "loss.batch_dice=true ties the samples of a batch together", "loss.batch_dice=false"),
        (weighted, "loss.class_weights cancel in the loss of one sample alone", "loss.class_weights=null"),
        (train.mixup > 0, "train.mixup lets one image into the gradients of others", "train.mixup=0"),
        (train.cutmix > 0, "train.cutmix lets one image into the gradients of others", "train.cutmix=0"),
        (train.balanced, "train.balanced draws by the labels of all, not by lot", "train.balanced=false"),
        (train.checkpointing != "off", "train.checkpointing hides layers from their hooks", "train.checkpointing=off"),
        (train.patience is not None, "train.patience stops by looks at private cases", "train.patience=null"),
        (
            train.budget is not None,
            "train.budget leaves the number of steps open",
            "train.budget=null and train.epochs",
        ),
        (experiment.optim.sam_rho > 0, "optim.sam_rho asks the batch for gradients a second time", "optim.sam_rho=0"),
        (train.workers > 1, "train.workers above 1 is not built for private training", "train.workers=1"),
        (not precise, f"train.precision={train.precision} makes a norm too inexact to bound", "train.precision=fp32"),
        (experiment.augment.adaptive, "augment.adaptive follows looks at private cases", "augment.adaptive=false"),
        (experiment.schedule.name == "plateau", "schedule.name=plateau follows looks at private cases", "cosine"),
    ]
    found = [f"{what} (set {fix})" for holds, what, fix in wrong if holds]
    if found:
        raise PrivacyError("not sound under privacy.epsilon: " + "; ".join(found))
