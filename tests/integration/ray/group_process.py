"""One process of a group, without Ray: it trains each scenario, and rank 0 writes what came of it.

python -m tests.integration.ray.group_process FOLDER RANK SIZE
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medray.config.schema import Experiment
from medray.learn.metrics import binary_auc
from medray.tasks.catalogue import build_loss
from medray.train.fit import fit
from medray.train.runtime import Runtime

BATCH, STEPS, EPOCHS = 7, 5, 4  # 7 samples for 2 and for 3 processes: uneven parts


class Batches:
    """float64 batches that follow from epoch and position; each process takes every ``ranks``-th sample."""

    def __init__(self, kind: str, rank: int = 0, ranks: int = 1) -> None:
        self.kind, self.rank, self.ranks, self.epoch = kind, rank, ranks, 0

    def shard(self, rank: int, ranks: int) -> Batches:
        return Batches(self.kind, rank, ranks)

    def __len__(self) -> int:
        return STEPS

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for position in range(STEPS):
            image, target = draw(self.kind, BATCH, 1000 * self.epoch + position)
            mine = slice(self.rank, None, self.ranks)
            yield {"image": image[mine], "target": target[mine], "index": torch.arange(BATCH)[mine]}


def draw(kind: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    score = image.mean(1)
    if kind == "segmentation":
        target = (score > 0.3).long() + (score > 0.9).long()
        target[0, :2] = 255
        return image, target
    means = image.mean((2, 3)) * 6
    if kind == "multilabel":
        return image, (means > 0.2).to(torch.float64)
    return image, (means.sum(1) > 0).long() + (means[:, 0] > 0.8).long()


def network(kind: str, norm: bool) -> nn.Module:
    torch.manual_seed(3)
    head: list[nn.Module] = [nn.Conv2d(6, 3, 1)]
    if kind != "segmentation":
        head = [nn.Flatten(), nn.Linear(6 * 36, 2 if kind == "multilabel" else 3)]
    body = [nn.Conv2d(2, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.SiLU()]
    return nn.Sequential(*body, *head).double()


SCENARIOS: dict[str, dict[str, Any]] = {
    "cross-entropy, class weights": {"kind": "classification",
        "loss": {"name": "cross_entropy", "class_weights": [1, 3, 0.5], "label_smoothing": 0.1}},
    "focal": {"kind": "classification", "loss": {"name": "focal"}},
    "several labels": {"kind": "multilabel", "loss": {"name": "bce"}},
    "Dice per sample": {"kind": "segmentation", "loss": {"name": "dice_ce", "batch_dice": False}},
    "Dice over the batch": {"kind": "segmentation", "loss": {"name": "dice_ce", "batch_dice": True}},
    "Tversky over the batch": {"kind": "segmentation", "loss": {"name": "tversky", "batch_dice": True}},
    "batch-norm": {"kind": "classification", "norm": True, "loss": {"name": "cross_entropy"}},
    "batch-norm and Dice": {"kind": "segmentation", "norm": True, "loss": {"name": "dice_ce", "batch_dice": True}},
    "micro-batches": {"kind": "classification", "loss": {"name": "cross_entropy"}, "train": {"micro_batch": 2}},
    "micro-batches, Dice over the batch": {"kind": "segmentation", "loss": {"name": "dice_ce", "batch_dice": True},
        "train": {"micro_batch": 2}},
    "EMA, AdamW": {"kind": "classification", "loss": {"name": "cross_entropy"}, "optim": {"name": "adamw", "lr": 1e-3},
        "train": {"ema": 0.9}},
    "checkpointing, batch-norm and Dice": {"kind": "segmentation", "norm": True,
        "loss": {"name": "dice_ce", "batch_dice": True}, "train": {"checkpointing": 1}},
    "checkpointing, micro-batches": {"kind": "segmentation", "loss": {"name": "dice_ce", "batch_dice": True},
        "train": {"checkpointing": 1, "micro_batch": 2}},
    "sharpness, batch-norm": {"kind": "classification", "norm": True, "loss": {"name": "cross_entropy"},
        "optim": {"name": "sgd", "lr": 0.05, "clip_norm": 1.0, "sam_rho": 0.1}},
    "sharpness, micro-batches, Dice over the batch": {"kind": "segmentation",
        "loss": {"name": "dice_ce", "batch_dice": True}, "train": {"micro_batch": 2},
        "optim": {"name": "sgd", "lr": 0.05, "clip_norm": 1.0, "sam_rho": 0.1}},
    "a frozen encoder, layer decay": {"kind": "classification", "norm": True, "loss": {"name": "cross_entropy"},
        "model": {"pretrained": "given.safetensors"}, "train": {"freeze_epochs": 2},
        "optim": {"name": "sgd", "lr": 0.05, "clip_norm": 1.0, "layer_decay": 0.5}},
    "as many as fit": {"kind": "classification", "norm": True, "loss": {"name": "cross_entropy"},
        "train": {"micro_batch": "auto"}},
}  # fmt: skip


def outcome(name: str, runtime: Runtime) -> dict[str, Any]:
    """Weights, losses and metrics of a scenario."""
    scenario = SCENARIOS[name]
    kind = scenario["kind"]
    experiment = Experiment.model_validate(
        {
            "device": "cpu",
            "loss": scenario["loss"],
            "model": scenario.get("model", {}),
            "optim": scenario.get("optim", {"name": "sgd", "lr": 0.05, "clip_norm": 1.0}),
            "train": {"epochs": EPOCHS, "batch_size": BATCH, "precision": "fp32", "validate_every": 1}
            | scenario.get("train", {}),
        }
    )
    classes = 2 if kind == "multilabel" else 3
    model = network(kind, scenario.get("norm", False))
    images, _ = draw("classification", 11, 10**6)
    truth = np.arange(11) % 2

    def validate(module: nn.Module) -> dict[str, float]:
        scores = np.zeros(11)
        mine = runtime.share(range(11))
        scores[list(mine)] = module(images[list(mine)]).flatten(1)[:, 0].numpy()
        scores = runtime.reduce({"scores": scores})["scores"]
        return {"val/auc": binary_auc(truth, scores), "val/sum": float(scores.sum())}

    loss = build_loss(experiment.loss, kind=kind, num_classes=classes).double()
    result = fit(
        experiment, model, Batches(kind), loss, validate=validate, objective=("val/auc", "max"), runtime=runtime
    )
    return {
        "weights": {key: value.double() for key, value in result.weights.items()},
        "last": {key: value.detach().double() for key, value in model.state_dict().items()},
        "rows": [[row["loss"], row["val/auc"], row["val/sum"]] for row in result.history],
    }


def promises(runtime: Any, rank: int, size: int) -> dict[str, bool]:
    """What a group owes beyond the contract that every runtime is held to."""
    shares = [list(range(10))[r::size] for r in range(size)]
    gathered = runtime.gather(torch.arange(rank + 1) + 10 * rank)
    buffers = nn.BatchNorm1d(2)
    buffers.running_mean.fill_(float(rank))
    runtime.align(buffers)
    sums = runtime.reduce({"a": [1.0, float(rank)], "b": np.nan if rank else 1.0})
    return {
        "shares": list(runtime.share(range(10))) == shares[rank],
        "gather": gathered.tolist() == [10 * r + i for r in range(size) for i in range(r + 1)],
        "align": buffers.running_mean.tolist() == [0.0, 0.0],
        "reduce": sums["a"].tolist() == [size, sum(range(size))] and bool(np.isnan(sums["b"])),
        "agree": runtime.agree(rank == size - 1) and not runtime.agree(False),
        "from main": runtime.from_main({"rank": rank}) == {"rank": 0},
        "lanes": runtime.lane == rank and runtime.is_main == (rank == 0) and not runtime.is_alone,
    }


def main(folder: Path, rank: int, size: int) -> None:
    from medray.engines.ray.group import GroupRuntime

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    runtime = GroupRuntime("cpu")
    kept = promises(runtime, rank, size)
    found = {name: outcome(name, runtime) for name in SCENARIOS}
    everyone = [None] * size
    dist.all_gather_object(everyone, kept)
    if rank == 0:
        torch.save({"found": found, "promises": everyone}, folder / f"group-{size}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
