"""train.checkpointing: the same run with less memory, whatever else is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medray.config.schema import Experiment, TrainConfig
from medray.models import checkpointing
from medray.tasks.catalogue import build_loss
from medray.train.fit import fit
from medray.train.progress import FitResult


class Shapes:
    """Squares to be found in noise, drawn by (epoch, position)."""

    def __init__(self, size: int = 4) -> None:
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for position in range(len(self)):
            generator = torch.Generator().manual_seed(100 * self.epoch + position)
            target = torch.zeros(self.size, 16, 16, dtype=torch.long)
            target[:, 4:12, 5:11] = 1
            noise = torch.randn(self.size, 1, 16, 16, generator=generator)
            yield {"image": noise + target[:, None], "target": target, "index": torch.arange(self.size)}


class _Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.Dropout(0.3)
        )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(_Block(1, 8), _Block(8, 8)), nn.Sequential(_Block(8, 8), _Block(8, 8)), nn.Conv2d(8, 2, 1)
    )


def train(
    how: object, run_dir: Path | None = None, model: nn.Module | None = None, epochs: int = 3, **fields: object
) -> FitResult:
    sections: dict[str, Any] = {"train": {"epochs": epochs, "batch_size": 4, "checkpointing": how, "precision": "fp32"}}
    sections["train"] |= fields
    spec = Experiment.model_validate({"device": "cpu", "optim": {"lr": 0.01}, **sections})
    loss = build_loss(spec.loss, kind="segmentation", num_classes=2)  # Dice over the batch: not a sum over its parts
    return fit(
        spec, model or network(), Shapes(), loss, validate=lambda _: {"val/x": 0.0}, objective=("val/x", "max"),
        run_dir=run_dir,
    )  # fmt: skip


def same(one: FitResult, other: FitResult) -> bool:
    losses = [[row["loss"] for row in result.history] for result in (one, other)]
    return losses[0] == losses[1] and all(torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


@pytest.mark.parametrize("how", ["auto", 1, 2, 4])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_it_learns_the_same_bit_for_bit(how: object, micro_batch: int | None) -> None:
    assert same(train("off", micro_batch=micro_batch), train(how, micro_batch=micro_batch))


@pytest.mark.parametrize("fields", [{"ema": 0.9}, {"precision": "bf16"}], ids=str)
def test_it_goes_with_averaging_and_mixed_precision(fields: dict[str, object]) -> None:
    assert same(train("off", **fields), train("auto", **fields))


def test_it_is_at_work_while_training_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    plain = checkpointing.checkpoint

    def counted(*args: Any, **options: Any) -> Any:
        again.append(1)
        return plain(*args, **options)

    monkeypatch.setattr(checkpointing, "checkpoint", counted)
    model = network()
    kinds = [type(part) for part in model.modules()]
    train(2, model=model)
    assert len(again) == 2 * 9  # segments, steps
    assert [type(part) for part in model.modules()] == kinds
    again.clear()
    train("off")
    assert not again


def test_a_run_can_go_on_with_another_setting(tmp_path: Path) -> None:
    """It decides where a run's memory goes, not what is learnt: the checkpoint is the same experiment's."""
    ended = train("off", tmp_path)
    assert same(ended, train("auto", tmp_path))
    assert same(ended, train(4, tmp_path))


def test_it_goes_with_distributed_data_parallel() -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    def gradients(how: checkpointing.How) -> dict[str, Tensor]:
        model, batch = network().train(), next(iter(Shapes()))["image"]
        checkpointing.apply(model, how, batch)
        wrapped = DistributedDataParallel(model)
        torch.manual_seed(1)
        with wrapped.no_sync():
            wrapped(batch[:2]).square().mean().backward()
        wrapped(batch[2:]).square().mean().backward()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | buffers

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, again = gradients("off"), gradients(2)
    finally:
        dist.destroy_process_group()
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), (False, "off"), ("auto", "auto"), (8, 8)])
def test_the_setting(written: object, meant: object) -> None:
    assert TrainConfig.model_validate({"checkpointing": written}).checkpointing == meant


@pytest.mark.parametrize("written", [0, -3, True, "on", 2.5, None])
def test_a_wrong_setting_is_refused(written: object) -> None:
    with pytest.raises(ValidationError, match="must be off, auto, or a number of segments of at least 1"):
        TrainConfig.model_validate({"checkpointing": written})
