"""What fit() does beyond the plain step: sharpness, frozen encoders, layer-wise rates, as many samples as fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medray.errors import ConfigError, ModelError
from medray.tasks.catalogue import build_loss
from medray.train.capacity import largest_micro_batch
from medray.train.progress import FitResult, Progress
from medray.train.runtime import LocalRuntime
from medray.train.sharpness import ascended
from tests.unit.train.test_fit import Blobs, Deep, Pixels, accuracy, experiment, network, overlap, run, same

GIVEN = {"model__pretrained": "given.safetensors"}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


class Wide(nn.Module):
    """:func:`network` with a log-variance beside each logit, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.body[-1] = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y if self.training else y[:, :2]


# -- sharpness


def test_sharpness_takes_the_gradient_uphill_by_hand() -> None:
    spec = experiment(optim__name="sgd", optim__lr=0.1, optim__momentum=0.0, optim__weight_decay=0.0,
        optim__clip_norm=0.0, optim__sam_rho=0.5, schedule__name="constant", schedule__warmup=0.0,
        train__epochs=1, train__ema=0.0)  # fmt: skip
    result = run(spec, Blobs(batches=1), plain())
    model, batch = plain(), Blobs().draw(0)
    weights = list(model.parameters())

    def gradients() -> list[Tensor]:
        value = nn.functional.cross_entropy(model(batch["image"]), batch["target"])
        return list(torch.autograd.grad(value, weights))

    before, first = [p.detach().clone() for p in weights], gradients()
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(weights, first, strict=True):
            p += 0.5 * g / norm
    for value, start, g in zip(result.weights.values(), before, gradients(), strict=True):
        torch.testing.assert_close(value, start - 0.1 * g)


def test_weights_come_back_from_uphill_bit_for_bit_even_after_an_error() -> None:
    model = plain()
    start = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with pytest.raises(RuntimeError), ascended(list(model.parameters()), 0.3):
        assert not torch.equal(start[0], next(model.parameters()))
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize("batch_dice", [True, False])
def test_sharpness_with_micro_batches_is_that_of_the_batch(batch_dice: bool) -> None:
    results = []
    for micro in (None, 3):
        spec = experiment(loss__name="dice_ce", loss__batch_dice=batch_dice, train__micro_batch=micro,
            train__epochs=2, optim__sam_rho=0.1)  # fmt: skip
        loss = build_loss(spec.loss, kind="segmentation", num_classes=2)
        results.append(run(spec, Pixels(), Deep(), loss=loss, validate=overlap, objective=("val/dice", "max")))
    for key, value in results[0].weights.items():
        assert torch.allclose(value, results[1].weights[key], atol=1e-5)


def test_the_look_uphill_moves_no_running_statistics() -> None:
    model = network()
    run(experiment(optim__sam_rho=0.1, train__epochs=1), Blobs(batches=3), model)
    assert int(model[1].num_batches_tracked) == 3  # type: ignore[arg-type, union-attr]


def test_sharpness_refuses_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medray.train.fit.resolve_precision", lambda *_: "fp16")
    with pytest.raises(ConfigError, match=r"sam_rho=0.1 with fp16"):
        run(experiment(optim__sam_rho=0.1))


# -- frozen encoders, layer-wise rates


def test_a_frozen_encoder_stays_as_it_is_and_then_learns() -> None:
    model = network()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    moved: list[tuple[bool, bool, bool]] = []

    def watch(progress: Progress) -> bool:
        state = model.state_dict()
        parts = ("0.weight", "1.running_mean", "5.weight")
        moved.append(tuple(not torch.equal(start[part], state[part]) for part in parts))  # type: ignore[arg-type]
        return False

    spec = experiment(train__freeze_epochs=2, train__validate_every=1, train__epochs=4, **GIVEN)
    run(spec, model=model, on_validation=watch)
    assert moved == [(False, False, True), (False, False, True), (True, True, True), (True, True, True)]
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_that_ends_frozen_gives_the_model_back_whole() -> None:
    model = network()
    run(experiment(train__freeze_epochs=9, train__epochs=1, **GIVEN), model=model)
    assert all(p.requires_grad for p in model.parameters()) and model[1].training


def test_freezing_needs_given_weights_and_an_encoder() -> None:
    with pytest.raises(ValueError, match=r"freeze_epochs=2 needs model\.pretrained"):
        experiment(train__freeze_epochs=2)
    for changes in ({"optim__layer_decay": 0.5}, {"train__freeze_epochs": 1, **GIVEN}):
        with pytest.raises(ModelError, match="no encoder"):
            run(experiment(**changes), model=nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))


def test_layer_decay_moves_the_first_layers_least() -> None:
    def distance(decay: float) -> list[float]:
        model = plain()
        start = [p.detach().clone() for p in model.parameters()]
        run(experiment(optim__layer_decay=decay, train__epochs=1, optim__weight_decay=0.0), model=model)
        return [float((a - b).norm()) for a, b in zip(start, model.parameters(), strict=True)]

    even, decayed = distance(1.0), distance(0.01)
    assert decayed[0] < 0.05 * even[0] and decayed[2] > 0.5 * even[2]


# -- resume


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [5, 13])
def test_all_of_it_resumes_bit_for_bit(tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = experiment(loss__name="heteroscedastic", optim__sam_rho=0.05, optim__layer_decay=0.7, train__freeze_epochs=2,
        train__micro_batch=3, train__validate_every=1, **GIVEN)  # fmt: skip
    whole = run(spec, model=Wide())
    monkeypatch.setattr("medray.train.fit.CHECKPOINT_SECONDS", 0.0)

    class Stops(Blobs):
        def draw(self, seed: int) -> dict[str, Tensor]:
            if self.served > after + 1:
                raise Killed
            return super().draw(seed)

    with pytest.raises(Killed):
        run(spec, Stops(), Wide(), run_dir=tmp_path)
    assert same(whole.weights, run(spec, model=Wide(), run_dir=tmp_path).weights)


def test_noise_differs_from_step_to_step_where_a_batch_takes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    original = torch.randn_like

    def spy(x: Tensor) -> Tensor:
        drawn.append(original(x))
        return drawn[-1]

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(1, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y if self.training else y[:, :2]

    monkeypatch.setattr("medray.learn.losses.torch.randn_like", spy)
    spec = experiment(loss__name="dice_heteroscedastic", loss__samples=1, train__micro_batch=3, train__epochs=1)
    loss = build_loss(spec.loss, kind="segmentation", num_classes=2)
    run(spec, Pixels(batches=2), Maps(), loss=loss, validate=overlap, objective=("val/dice", "max"))
    assert len(drawn) == 2 and not torch.equal(*drawn)


# -- as many samples as fit


@contextmanager
def memory_of(monkeypatch: pytest.MonkeyPatch, samples: float, model: nn.Module) -> Iterator[None]:
    """A machine whose memory holds so many samples, each of which takes 100 MB."""
    fixed = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    with monkeypatch.context() as patch:
        patch.setattr("medray.train.capacity._spent", lambda _m, _i, number, *_: 100_000_000 * number)
        patch.setattr("medray.train.capacity._kept", lambda *_: 0)
        patch.setattr("medray.train.memory.available", lambda _: int((100_000_000 * samples + fixed) / 0.7) + 1)
        yield


@pytest.mark.parametrize(
    ("room", "expected"), [(100, 8), (8, 8), (7.9, 4), (4, 4), (3.9, 3), (2, 2), (1.5, 1), (0.1, 1)]
)
def test_the_largest_even_part_that_fits(room: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().train()
    images = torch.randn(2, 1, 6, 6)
    with memory_of(monkeypatch, room, model):
        found = largest_micro_batch(model, images, 8, precision="fp32", runtime=LocalRuntime())
    assert found == expected


class OnDevice(LocalRuntime):
    """Says that it is on a GPU, where what was reckoned is tried."""

    def __init__(self) -> None:
        self.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]


def test_on_a_gpu_the_answer_is_tried_and_halved_until_it_goes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that holds three samples, though the reckoning says eight. Only the card itself is made up."""
    tried: list[int] = []

    def forward(_model: nn.Module, _images: Tensor, number: int, *_: Any) -> None:
        tried.append(number)
        if number > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = network().train()
    with memory_of(monkeypatch, 100, model):
        monkeypatch.setattr("medray.train.capacity._pass", forward)
        found = largest_micro_batch(model, torch.randn(2, 1, 6, 6), 8, precision="fp32", runtime=OnDevice())
    assert (found, tried) == (2, [2, 8, 4, 2])  # two first: where not even they fit, nothing can be measured


def test_where_not_even_two_fit_one_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: nn.Module, images: Tensor, number: int, *_: object) -> None:
        if number > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = network().train()
    with memory_of(monkeypatch, 100, model):
        monkeypatch.setattr("medray.train.capacity._pass", forward)
        assert largest_micro_batch(model, torch.randn(2, 1, 6, 6), 8, precision="fp32", runtime=OnDevice()) == 1


def test_measuring_leaves_no_trace() -> None:
    model = network().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state()
    assert largest_micro_batch(model, torch.randn(2, 1, 6, 6), 8, precision="fp32", runtime=LocalRuntime()) == 8
    torch.set_rng_state(before)
    assert same(state, model.state_dict()) and all(p.grad is None for p in model.parameters())
    assert all(part.training for part in model.modules())


def test_a_real_measurement_follows_the_size_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three convolutions over 16 channels of 256² keep some 12 MB a sample; 100 MB do not hold 32 of them."""
    layers = [nn.Conv2d(16 if i else 1, 16, 3, padding=1) for i in range(3)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())]).train()
    monkeypatch.setattr("medray.train.memory.available", lambda _: 100 * 2**20)
    images = torch.randn(2, 1, 256, 256)
    found = largest_micro_batch(model, images, 32, precision="fp32", runtime=LocalRuntime())
    assert 1 <= found <= 5


def test_auto_accumulates_to_the_same_gradient_and_is_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(experiment(train__epochs=2), model=plain())
    spec = experiment(train__epochs=2, train__micro_batch="auto")
    with memory_of(monkeypatch, 3.9, plain()):
        found = run(spec, model=plain(), run_dir=tmp_path)
    assert (whole.micro_batch, found.micro_batch) == (8, 3)
    for key, value in whole.weights.items():
        assert torch.allclose(value, found.weights[key], atol=1e-5)
    monkeypatch.setattr("medray.train.fit.largest_micro_batch", lambda *_, **__: pytest.fail("measured again"))
    again: FitResult = run(spec, model=plain(), run_dir=tmp_path)
    assert again.micro_batch == 3 and same(found.weights, again.weights)


def test_a_killed_run_goes_on_with_the_parts_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = experiment(train__micro_batch="auto", train__validate_every=1)
    with memory_of(monkeypatch, 2, network()):
        whole = run(spec)

        class Stops(Blobs):
            def draw(self, seed: int) -> dict[str, Tensor]:
                if self.served > 10:
                    raise Killed
                return super().draw(seed)

        with pytest.raises(Killed):
            run(spec, Stops(), run_dir=tmp_path)
    again = run(spec, run_dir=tmp_path)  # on a machine where all would fit
    assert again.micro_batch == 2 and same(whole.weights, again.weights)


def test_a_seed_s_accuracy_survives_every_option() -> None:
    options: list[dict[str, Any]] = [{"optim__sam_rho": 0.05}, {"optim__layer_decay": 0.8},
        {"train__freeze_epochs": 5, **GIVEN}]  # fmt: skip
    for changes in options:
        assert run(experiment(train__epochs=20, **changes), validate=accuracy).best["val/accuracy"] > 0.85
