"""fit(): the whole of a run on a toy problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medray.config.schema import Experiment
from medray.errors import ConfigError, NonFiniteLossError, OutOfMemoryError, TrainingError
from medray.tasks.catalogue import build_loss
from medray.train.fit import fit
from medray.train.progress import FitResult


class Blobs:
    """Two classes of noisy vectors, drawn by (epoch, position)."""

    def __init__(
        self, batches: int = 4, size: int = 8, pause: float = 0.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.batches, self.size, self.pause, self.epoch, self.sleep = batches, size, pause, 0, sleep
        self.served = 0

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for position in range(self.batches):
            self.sleep(self.pause)
            self.served += 1
            yield self.draw(1000 * self.epoch + position)

    def poisson(self, rate: float, source: Any, *, groups: Any = None) -> Blobs:
        """Endless data: any batch of it is as good as a lot."""
        return self

    def draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(0, 2, (self.size,), generator=generator)
        image = torch.randn(self.size, 1, 6, 6, generator=generator) + target.view(-1, 1, 1, 1)
        return {"image": image, "target": target, "index": torch.arange(self.size)}


class Clock:
    """The clock that fit() reads: it goes on by what somebody sleeps, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("medray.train.fit.time", clock)
    return clock


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
    loss = options.pop("loss", None) or build_loss(spec.loss, kind="classification", num_classes=2)
    return fit(spec, model or network(), Blobs() if loader is None else loader, loss, **options)


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


def test_a_finished_run_gives_its_result_at_once(tmp_path: Path) -> None:
    first = run(experiment(), run_dir=tmp_path)
    loader = Blobs()
    again = run(experiment(), loader, run_dir=tmp_path)
    assert loader.served == 0 and same(first.weights, again.weights) and again.history == first.history
    anew = run(experiment(), loader, run_dir=tmp_path, resume=False)
    assert loader.served == 24 and same(first.weights, anew.weights)


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    run(experiment(), run_dir=tmp_path)
    with pytest.raises(TrainingError, match="another experiment"):
        run(experiment(optim__lr=0.5), run_dir=tmp_path)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_accumulation_equals_the_full_batch(size: int, name: str) -> None:
    def plain() -> nn.Module:  # no batch norm, no dropout: what sees or draws by part can't be equal
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    weights = (1.0, 3.0)
    results = []
    for micro in (None, size):
        spec = experiment(loss__name=name, loss__class_weights=weights, train__micro_batch=micro, train__epochs=2)
        results.append(run(spec, model=plain()))
    for key, value in results[0].weights.items():
        assert torch.allclose(value, results[1].weights[key], atol=1e-5)


class Pixels(Blobs):
    """A segmentation: the foreground is bright."""

    def draw(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        target = (torch.rand(self.size, 8, 8, generator=generator) < 0.2).long()
        image = torch.randn(self.size, 1, 8, 8, generator=generator) * 0.3 + target[:, None]
        return {"image": image, "target": target, "index": torch.arange(self.size)}


class Deep(nn.Module):
    """Two levels of logits while it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.body(x).relu()
        return [self.head(x), self.head(nn.functional.avg_pool2d(x, 2))] if self.training else self.head(x)


def overlap(model: nn.Module) -> dict[str, float]:
    assert not model.training and not torch.is_grad_enabled()
    torch.rand(3)  # draws: must not change the run
    batch = Pixels(size=8).draw(10**6)
    guess = model(batch["image"]).argmax(1)
    return {"val/dice": float(2 * (guess * batch["target"]).sum() / (guess.sum() + batch["target"].sum()))}


@pytest.mark.parametrize("batch_dice", [True, False])
def test_accumulation_is_exact_for_dice_over_the_batch_and_deep_supervision(batch_dice: bool) -> None:
    results = []
    for micro in (None, 3):
        spec = experiment(loss__name="dice_ce", loss__batch_dice=batch_dice, train__micro_batch=micro, optim__lr=0.05)
        loss = build_loss(spec.loss, kind="segmentation", num_classes=2)
        options = {"loss": loss, "validate": overlap, "objective": ("val/dice", "max")}
        results.append(run(spec, Pixels(), Deep(), **options))
    assert results[0].best["val/dice"] > results[0].history[0]["val/dice"]
    for key, value in results[0].weights.items():
        assert torch.allclose(value, results[1].weights[key], atol=1e-5)
    assert results[0].micro_batch == 8 and results[1].micro_batch == 3


class Hungry(nn.Sequential):
    """Fits ``room`` samples into memory."""

    room = 3
    kind: type[Exception] = RuntimeError
    message = (
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
    )

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) > self.room:
            raise self.kind(self.message)
        return super().forward(input)


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(kind: type[Exception]) -> None:
    def plain(factory: Any) -> nn.Module:
        torch.manual_seed(0)
        return factory(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    hungry = plain(Hungry)
    hungry.kind = kind  # type: ignore[assignment]
    result, reference = run(experiment(), model=hungry), run(experiment(), model=plain(nn.Sequential))
    assert result.micro_batch == 2
    for key, value in reference.weights.items():
        assert torch.allclose(value, result.weights[key], atol=1e-5)
    hungry.room = 0  # type: ignore[assignment]
    with pytest.raises(OutOfMemoryError, match=r"one sample of shape \(1, 6, 6\).*lower train.patch_size"):
        run(experiment(), model=hungry)


def test_other_runtime_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run(experiment(), Pixels(), nn.Sequential(nn.Flatten(), nn.Linear(5, 2)))


class Poisoned(Blobs):
    def draw(self, seed: int) -> dict[str, Tensor]:
        batch = super().draw(seed)
        if seed == 1001:
            batch["image"][3, 0, 2, 2] = torch.inf
        return batch


def test_a_broken_input_is_named_with_its_step_and_case() -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 5 \(epoch 2, learning rate .*input was the first.*number 3"):
        run(experiment(), Poisoned())


def test_diverged_weights_broken_logits_losses_and_gradients_are_told_apart() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(
        NonFiniteLossError, match=r"weights were the first that are not finite \(0.weight\).*lower|Lower"
    ):
        run(experiment(), model=model)

    class Overflows(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * torch.inf

    with pytest.raises(NonFiniteLossError, match="logits were the first"):
        run(experiment(), model=Overflows(nn.Flatten(), nn.Linear(36, 2)))

    class Odd(nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return (logits.sum() * 0 - 1).log()

    with pytest.raises(NonFiniteLossError, match="loss itself was the first"):
        run(experiment(), loss=Odd())

    class Steep(nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return (logits - logits.detach()).sum().sqrt()

    with pytest.raises(NonFiniteLossError, match="gradient became non-finite at step 0"):
        run(experiment(), loss=Steep())


def test_stops_early_without_gain_and_when_told_to() -> None:
    worse = iter(range(1000))
    result = run(
        experiment(train__epochs=50, train__patience=3, train__validate_every=1),
        validate=lambda model: {"m": -next(worse)},
        objective=("m", "max"),
    )
    assert (result.stopped, len(result.history), result.best_epoch) == ("early", 4, 1)
    seen: list[Any] = []
    result = run(experiment(train__validate_every=2), on_validation=lambda p: seen.append(p) or p.step >= 16)
    assert result.stopped == "pruned" and [p.step for p in seen] == [8, 16]
    assert [p.epoch for p in seen] == [2, 4] and seen[0].fraction == pytest.approx(1 / 3)


def test_nan_is_never_best_and_an_unknown_objective_is_named() -> None:
    values = iter([float("nan"), 0.5, float("nan"), 0.4])
    result = run(
        experiment(train__epochs=4, train__validate_every=1),
        validate=lambda m: {"m": next(values)},
        objective=("m", "max"),
    )
    assert result.best == {"m": 0.5} and result.best_epoch == 2
    with pytest.raises(ConfigError, match="'val/auc' is not measured here; there are: val/accuracy, val/loss"):
        run(experiment(), objective=("val/auc", "max"))


def test_a_budget_is_used_up_and_the_schedule_ends_with_it(clock: Clock) -> None:
    spec = experiment(train__budget=3.0, train__epochs=100_000, schedule__name="cosine")

    def slow(model: nn.Module) -> dict[str, float]:
        clock.sleep(0.05)
        return accuracy(model)

    result = run(spec, Blobs(pause=0.01, sleep=clock.sleep), validate=slow)
    assert result.stopped == "finished"
    assert 2.6 < result.seconds < 3.2
    assert result.history[-1]["fraction"] == 1.0
    assert result.history[-1]["lr"] == pytest.approx(0.01 * 0.01, rel=0.05)
    assert 4 <= len(result.history) <= 10  # of 0.05 s, within 15 % of 3 s
    late = [row["step"] / result.steps for row in result.history if row["step"] > result.steps / 2]
    assert len(late) >= len(result.history) / 2


def test_a_budget_survives_a_machine_that_slows_down(clock: Clock) -> None:
    class Slows(Blobs):
        def draw(self, seed: int) -> dict[str, Tensor]:
            self.pause = 0.005 if self.served < 100 else 0.02
            return super().draw(seed)

    result = run(experiment(train__budget=3.0, train__epochs=100_000), Slows(pause=0.005, sleep=clock.sleep))
    assert result.stopped == "finished" and result.history[-1]["fraction"] == 1.0
    assert 2.6 < result.seconds < 3.4


def test_a_deadline_ends_the_run_with_a_last_validation(tmp_path: Path, clock: Clock) -> None:
    deadline = clock.now + 1.0
    loader = Blobs(pause=0.01, sleep=clock.sleep)
    result = run(experiment(train__epochs=10_000), loader, deadline=deadline, run_dir=tmp_path)
    assert deadline - 0.1 < clock.now < deadline + 0.02
    assert result.stopped == "deadline" and result.history[-1]["step"] == result.steps
    passed = run(experiment(), deadline=clock.now - 1)
    assert passed.stopped == "deadline" and passed.steps == 0 and passed.best == {}


def test_weights_are_the_average_and_the_model_keeps_its_own() -> None:
    model = network()
    result = run(experiment(train__ema=0.99), model=model)
    assert not same(result.weights, model.state_dict())
    plain = run(experiment(train__ema=0.0, train__validate_every=6), model=model)
    assert same(plain.weights, model.state_dict())


def test_a_tracker_is_told_and_global_state_is_restored() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.seen: dict[str, list[int]] = {}

        def scalars(self, values: dict[str, float], step: int) -> None:
            for name in values:
                self.seen.setdefault(name, []).append(step)

    tracker = Tracker()
    run(experiment(train__deterministic=True), tracker=tracker)
    assert tracker.seen["val/loss"][-1] == 24 and len(tracker.seen["train/loss"]) == 24
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_tracker_is_told_how_fast_it_goes_and_what_it_waits_for() -> None:
    class Tracker:
        def __init__(self) -> None:
            self.seen: dict[str, list[float]] = {}

        def scalars(self, values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                self.seen.setdefault(name, []).append(value)

    tracker, pause = Tracker(), 0.01
    run(experiment(), Blobs(pause=pause), tracker=tracker)
    rates, waits = tracker.seen["system/samples_per_second"], tracker.seen["system/loader_wait"]
    assert len(rates) == len(waits) == len(tracker.seen["val/loss"])
    for rate, wait in zip(rates, waits, strict=True):
        assert 0 < rate <= 8 / pause
        assert rate / 8 * pause <= wait <= 1  # each step has waited that long at least
    assert min(tracker.seen["system/peak_memory_mb"]) > 1 and "system/device_use" not in tracker.seen


def test_a_loader_hears_what_each_epoch_came_to(tmp_path: Path) -> None:
    class Listens(Blobs):
        workers = 3

        def __init__(self) -> None:
            super().__init__(pause=0.005)
            self.heard: list[tuple[float, float, float]] = []

        def observe(self, samples: float, seconds: float, waited: float) -> None:
            self.heard.append((samples, seconds, waited))

    loader = Listens()
    result = run(experiment(), loader)
    assert len(loader.heard) >= 5 and all(samples == 4 * 8 for samples, _, _ in loader.heard)
    assert all(4 * 0.005 <= waited <= seconds for _, seconds, waited in loader.heard)
    waited, seconds = (sum(row[column] for row in loader.heard) for column in (2, 1))
    assert result.loader_wait == pytest.approx(waited / seconds, abs=0.2) and result.loader_workers == 3


def test_a_loader_without_batches_or_with_too_few_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no batch"):
        run(experiment(), Blobs(batches=0))

    class Short(Blobs):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield self.draw(0)

    with pytest.raises(TrainingError, match="ended before the 4 batches"):
        run(experiment(), Short())
