"""Losses: values by hand, and the rules that all of them keep."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medray.config.schema import LossConfig
from medray.errors import ConfigError
from medray.learn.losses import nearest
from medray.tasks.catalogue import TASKS, build_loss, find_task

EVERY = [(kind, name) for kind, task in TASKS.items() for name in task.losses]


def make(kind: Any, name: str, **options: Any) -> Any:
    return build_loss(LossConfig(name=name, **options), kind=kind, num_classes=3)  # type: ignore[arg-type]


def sample(kind: str, batch: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    space = (4, 6) if kind == "segmentation" else ()
    logits = torch.randn(batch, find_task(kind).outputs(3), *space, generator=generator)
    if kind == "multilabel":
        return logits, torch.randint(0, 2, (batch, 3), generator=generator).float()
    return logits, torch.randint(0, 3, (batch, *space), generator=generator)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the heteroscedastic losses is nothing, so that they keep the rules of the others to the last digit;
    what the noise does has tests of its own."""
    monkeypatch.setattr("medray.learn.losses.torch.randn_like", torch.zeros_like)


def widened(name: str, logits: Tensor) -> Tensor:
    """With log-variances, where the loss wants them."""
    return torch.cat([logits, torch.zeros_like(logits)], dim=1) if "heteroscedastic" in name else logits


def perfect(kind: str, target: Tensor) -> Tensor:
    if kind == "multilabel":
        return 40 * target - 20
    if kind == "ordinal":
        return 40.0 * (target[:, None] > torch.arange(2)) - 20
    return 40 * F.one_hot(target, 3).movedim(-1, 1).float() - 20


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_is_near_zero_when_right_large_when_wrong_and_differentiable(kind: str, name: str, quiet: None) -> None:
    _, target = sample(kind)
    loss, right = make(kind, name), widened(name, perfect(kind, sample(kind)[1]))
    assert float(loss(right, target)) < 1e-3
    wrong = (-right).requires_grad_()
    value = loss(wrong, target)
    assert value.shape == () and value.dtype == torch.float32 and float(value) > 0.5
    value.backward()
    assert torch.isfinite(wrong.grad).all()
    logits = widened(name, sample(kind)[0]).requires_grad_()
    loss(logits, target).backward()
    assert float(logits.grad.abs().sum()) > 0


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_the_sum_of_parts_is_the_whole(
    kind: str, name: str, smoothing: float, weights: Any, batch_dice: bool, quiet: None
) -> None:
    loss = make(kind, name, label_smoothing=smoothing, class_weights=weights, batch_dice=batch_dice)
    logits, target = sample(kind)
    logits = widened(name, logits)
    if find_task(kind).target != "class":
        target[0, ..., :2] = 255
    whole = loss(logits, target)
    parts = loss(logits[:1], target[:1], target) + loss(logits[1:], target[1:], target)
    assert loss.separable == bool(torch.isclose(parts, whole, rtol=1e-5))


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in EVERY if find_task(k).target != "class"])
def test_ignored_targets_have_neither_value_nor_gradient(kind: str, name: str, quiet: None) -> None:
    loss = make(kind, name, label_smoothing=0.1)
    logits, target = sample(kind)
    logits = widened(name, logits)
    target[:, ..., -2:] = 255
    other = logits.clone()
    other[..., -2:] = 50.0
    assert torch.equal(loss(logits, target), loss(other, target))
    logits.requires_grad_()
    loss(logits, target).backward()
    assert float(logits.grad[..., -2:].abs().sum()) == 0
    assert torch.isfinite(loss(logits, torch.full_like(target, 255)))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_computes_in_float32_under_autocast(kind: str, name: str, quiet: None) -> None:
    logits, target = sample(kind)
    logits = widened(name, logits)
    loss = make(kind, name)
    low = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(low, target)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(low.float(), target))


@pytest.mark.parametrize(("smoothing", "weights"), itertools.product([0.0, 0.2], [None, (0.5, 1.0, 2.0)]))
def test_cross_entropy_is_pytorchs(smoothing: float, weights: Any) -> None:
    tensor = None if weights is None else torch.tensor(weights)
    for kind in ("classification", "segmentation"):
        logits, target = sample(kind)
        expected = F.cross_entropy(logits, target, tensor, label_smoothing=smoothing)
        options = {"label_smoothing": smoothing, "class_weights": weights}
        assert torch.isclose(make(kind, "cross_entropy", **options)(logits, target), expected)
        focal = make(kind, "focal", gamma=0.0, **options)
        assert torch.isclose(focal(logits, target), expected)
        if kind == "segmentation":
            both = make(kind, "dice_ce", **options)(logits, target)
            dice = make(kind, "dice", class_weights=weights)(logits, target)
            assert torch.isclose(both - dice, expected)


def noisy(name: str, variance: float, samples: int, logits: Tensor, target: Tensor) -> Tensor:
    kind = "segmentation" if logits.ndim > 2 else "classification"
    torch.manual_seed(1)
    spread = torch.full_like(logits, variance).log()
    value: Tensor = make(kind, name, samples=samples)(torch.cat([logits, spread], dim=1), target)
    return value


def test_heteroscedastic_is_minus_the_log_of_the_mean_probability_under_noise() -> None:
    """By another road: the expectation of a softmax of two logits is an integral over their one difference."""
    gap, variance = 1.5, 2.0
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    mean = float((torch.sigmoid(gap + (2 * variance) ** 0.5 * grid) * density).sum() / density.sum())
    torch.manual_seed(0)
    loss = build_loss(LossConfig(name="heteroscedastic", samples=256), kind="classification", num_classes=2)
    outputs = torch.tensor([[gap, 0.0, variance, variance]])
    outputs[:, 2:] = outputs[:, 2:].log()
    rows = outputs.repeat(400, 1)
    assert float(loss(rows, torch.zeros(400, dtype=torch.int64))) == pytest.approx(-math.log(mean), rel=0.01)


def test_heteroscedastic_without_variance_is_cross_entropy_and_variance_takes_weight_off_what_is_wrong() -> None:
    for kind, name, plain in (
        ("classification", "heteroscedastic", "cross_entropy"),
        ("segmentation", "dice_heteroscedastic", "dice_ce"),
    ):
        logits, target = sample(kind)
        assert float(noisy(name, 1e-4, 4, logits, target)) == pytest.approx(
            float(make(kind, plain)(logits, target)), rel=0.02
        )
    wrong = -perfect("classification", torch.arange(3)) / 4
    attenuated = float(noisy("heteroscedastic", 100.0, 64, wrong, torch.arange(3)))
    assert attenuated < 0.8 * float(noisy("heteroscedastic", 1e-4, 64, wrong, torch.arange(3)))
    outputs = torch.cat([wrong, torch.zeros_like(wrong)], dim=1).requires_grad_()
    make("classification", "heteroscedastic")(outputs, torch.arange(3)).backward()
    assert (outputs.grad[:, 3:].sum(1) < 0).all()  # downhill is towards a larger variance


def test_heteroscedastic_refuses_a_network_without_variances() -> None:
    logits, target = sample("classification")
    with pytest.raises(ConfigError, match=r"model\.log_variance=true"):
        make("classification", "heteroscedastic")(logits, target)


def test_mixed_labels_equal_mixed_losses() -> None:
    logits, target = sample("classification")
    loss = make("classification", "cross_entropy")
    other = target.roll(1)
    mixed = 0.3 * F.one_hot(target, 3) + 0.7 * F.one_hot(other, 3)
    assert torch.isclose(loss(logits, mixed), 0.3 * loss(logits, target) + 0.7 * loss(logits, other))


def test_focal_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    p = float(logits.softmax(1)[0, 0])
    value = make("classification", "focal", gamma=2.0)(logits, torch.tensor([0]))
    assert float(value) == pytest.approx(-((1 - p) ** 2) * torch.log(torch.tensor(p)).item(), rel=1e-5)


def test_dice_and_tversky_by_hand() -> None:
    # One foreground voxel of four is hit, one is a false alarm.
    target = torch.tensor([[[1, 0, 0, 0]]])
    truth = torch.tensor([[[1, 1, 0, 0]]])
    logits = perfect("segmentation", truth)[:, :2]
    config = {"kind": "segmentation", "num_classes": 2}
    dice = build_loss(LossConfig(name="dice"), **config)(logits, target)  # type: ignore[arg-type]
    assert float(dice) == pytest.approx(1 - 2 / 3, abs=1e-4)
    tversky = build_loss(LossConfig(name="tversky", alpha=0.1, beta=0.9), **config)(logits, target)  # type: ignore[arg-type]
    assert float(tversky) == pytest.approx(1 - 1 / 1.1, abs=1e-4)


def test_deep_supervision_halves_the_weight_of_each_level() -> None:
    loss = make("segmentation", "cross_entropy")
    fine, target = sample("segmentation")
    coarse = sample("segmentation", seed=1)[0][..., ::2, ::2]
    expected = (2 * loss(fine, target) + loss(coarse, nearest(target, (2, 3)))) / 3
    assert torch.isclose(loss([fine, coarse], target), expected)


def test_nearest_takes_voxels_at_the_coarse_centres() -> None:
    target = torch.arange(6)[None, :].expand(1, 6)
    assert nearest(target, (3,)).tolist() == [[1, 3, 5]]
    assert nearest(target, (2,)).tolist() == [[1, 4]]
    assert nearest(target, (6,)) is target


def test_class_255_of_many_is_learnt() -> None:
    loss = build_loss(LossConfig(name="cross_entropy"), kind="classification", num_classes=300)
    assert float(loss(torch.zeros(1, 300), torch.tensor([255]))) > 1


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="use one of cross_entropy, focal, bce"):
        make("classification", "dice")
    with pytest.raises(ConfigError, match="2 values for 3 classes"):
        make("segmentation", "dice", class_weights=(1.0, 1.0))
    with pytest.raises(ConfigError, match="all zero"):
        make("segmentation", "dice", class_weights=(1.0, 0.0, 0.0))
