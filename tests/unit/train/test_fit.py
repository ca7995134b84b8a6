"""fit(): the whole of a run on a toy problem."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medray.config.schema import Experiment
from medray.learn.losses import build_loss
from medray.train.fit import fit
from medray.train.progress import FitResult


class Blobs:
    """Two classes of noisy vectors, drawn by (epoch, position)."""

    def __init__(self, batches: int = 4, size: int = 8, pause: float = 0.0) -> None:
        self.batches, self.size, self.pause, self.epoch = batches, size, pause, 0
        self.served = 0

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for position in range(self.batches):
            time.sleep(self.pause)
            self.served += 1
            yield self.draw(1000 * self.epoch + position)

    def draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(0, 2, (self.size,), generator=generator)
        image = torch.randn(self.size, 1, 6, 6, generator=generator) + target.view(-1, 1, 1, 1)
        return {"image": image, "target": target, "index": torch.arange(self.size)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 2)
    )


def accuracy(model: nn.Module) -> dict[str, float]:
    batch = Blobs(size=64).draw(10**6)
    logits = model(batch["image"])
    return {
        "val/accuracy": float((logits.argmax(1) == batch["target"]).float().mean()),
        "val/loss": float(nn.functional.cross_entropy(logits, batch["target"])),
    }


def experiment(**changes: Any) -> Experiment:
    tree: dict[str, Any] = {
        "device": "cpu",
        "loss": {"name": "cross_entropy"},
        "optim": {"lr": 0.01},
        "train": {"epochs": 6, "ema": 0.9, "precision": "fp32"},
    }
    for path, value in changes.items():
        section, field = path.split("__")
        tree.setdefault(section, {})[field] = value
    return Experiment.model_validate(tree)


def run(spec: Experiment, loader: Any = None, model: nn.Module | None = None, **options: Any) -> FitResult:
    options = {"validate": accuracy, "objective": ("val/loss", "min"), **options}
    loss = options.pop("loss", build_loss(spec.loss, kind="classification", num_classes=2))
    return fit(spec, model or network(), loader or Blobs(), loss, **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_learns_and_tells_what_it_did() -> None:
    result = run(experiment(train__epochs=20))
    assert result.best["val/accuracy"] > 0.9
    assert (result.steps, result.epochs, result.stopped) == (80, 20, "finished")
    assert result.history[-1]["step"] == 80 and result.history[-1]["fraction"] == 1.0
    assert min(row["val/loss"] for row in result.history) == result.best["val/loss"]
    assert result.step_seconds > 0 and result.peak_memory_mb > 10
    model = network()
    model.load_state_dict(result.weights)
    assert accuracy(model.eval()) == result.best


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 13])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumes_to_the_same_result_bit_for_bit(
    tmp_path: Path, after: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = experiment(train__precision=precision, schedule__name="plateau", schedule__patience=1)
    whole = run(spec)
    monkeypatch.setattr("medray.train.fit.CHECKPOINT_SECONDS", 0.0)  # after every step, so in the middle of epochs too
    monkeypatch.setattr("medray.train.fit._Run.save_seconds", 0.0, raising=False)

    class Stops(Blobs):
        def draw(self, seed: int) -> dict[str, Tensor]:
            if self.served > after + 1:
                raise Killed
            return super().draw(seed)

    with pytest.raises(Killed):
        run(spec, Stops(), run_dir=tmp_path)
    again = run(spec, run_dir=tmp_path)
    assert same(whole.weights, again.weights)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in whole.history]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in again.history]
