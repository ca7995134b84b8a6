"""Per-sample gradients: every way against autograd's plain loop, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medray.config.schema import LossConfig, ModelConfig
from medray.errors import PrivacyError
from medray.learn.losses import Loss
from medray.models.catalogue import build_model
from medray.privacy.gradients import MODES, Mode, choose, factors, make
from medray.privacy.models import refuse_unsound
from medray.tasks.catalogue import build_loss


def catalogue_model(name: str, *, kind: str = "classification", norm: str = "group", side: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return build_model(
        ModelConfig.model_validate({"name": name, "norm": norm}),
        kind=kind,  # type: ignore[arg-type]
        ndim=2,
        in_channels=1,
        num_outputs=3,
        patch_size=(side, side),
    ).train()


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    ).train()


def by_hand(model: nn.Module, loss: Any, images: Tensor, targets: Tensor, clip: float) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in model.parameters()]
    for image, target in zip(images, targets, strict=True):
        model.zero_grad()
        loss(model(image[None]), target[None]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        norm = float(torch.sqrt(sum((g.double() ** 2).sum() for g in grads)))
        for sum_, grad in zip(total, grads, strict=True):
            sum_ += grad * min(1.0, clip / norm)
    model.zero_grad(set_to_none=True)
    return total


def entropy() -> Loss:
    loss = build_loss(LossConfig(name="cross_entropy"), kind="classification", num_classes=3)
    loss.branch_free = True
    return loss


@pytest.mark.parametrize("clip", [0.1, 1e3])
@pytest.mark.parametrize("mode", MODES)
def test_every_way_gives_what_the_plain_loop_gives(mode: Mode, clip: float) -> None:
    model, loss = small(), entropy()
    images, targets = torch.randn(5, 1, 4, 4), torch.tensor([0, 2, 1, 1, 0])
    expected = by_hand(model, loss, images, targets, clip)
    way = make(mode, model, loss)
    for _ in range(2):  # nothing of one batch stays for the next
        found = way.clipped(images, targets, clip)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    way.close()
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())
    assert model(images).shape == (5, 3)


@pytest.mark.parametrize("name", ["dice_ce", "dice", "tversky", "focal", "cross_entropy", "bce"])
@pytest.mark.parametrize("mode", ["functorch", "loop"])
def test_every_loss_of_segmentation_sees_one_sample_alone(name: str, mode: Mode) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 3, padding=1).train()
    config = LossConfig(name=name, batch_dice=False, class_weights=(0.5, 1.0, 2.0))  # type: ignore[arg-type]
    loss = build_loss(config, kind="segmentation", num_classes=3)
    images, targets = torch.randn(3, 1, 6, 6), torch.randint(0, 3, (3, 6, 6))
    targets[0, :2] = 255
    expected = by_hand(model, loss, images, targets, 0.05)
    loss.apply(lambda part: setattr(part, "branch_free", True))
    for a, b in zip(make(mode, model, loss).clipped(images, targets, 0.05), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_no_sample_moves_the_sum_by_more_than_the_clip(mode: Mode) -> None:
    model, loss = small(), entropy()
    images, targets = 100 * torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    way = make(mode, model, loss)
    whole, without = way.clipped(images, targets, 0.3), way.clipped(images[:3], targets[:3], 0.3)
    moved = torch.sqrt(sum(((a - b).double() ** 2).sum() for a, b in zip(whole, without, strict=True)))
    assert 0.29 < float(moved) <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_is_not_finite_counts_for_nothing(mode: Mode) -> None:
    model, loss = small(), entropy()
    images, targets = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    way = make(mode, model, loss)
    expected = way.clipped(images[:2], targets[:2], 1.0)
    images[2] = float("inf")
    for a, b in zip(way.clipped(images, targets, 1.0), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert factors(torch.tensor([0.5, 2.0, float("nan"), float("inf")]), 1.0).tolist() == pytest.approx(
        [1.0, 0.5, 0.0, 0.0], abs=1e-5
    )


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(x - x.mean(0))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean()
        return self.last(x.flatten(1))


class Overwrites(nn.Module):
    """As residual networks that add in place do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        y += x.flatten(1)
        return self.last(y.relu_())


def test_what_mixes_or_remembers_samples_is_refused() -> None:
    images = torch.zeros(4, 1, 2, 2)
    with pytest.raises(PrivacyError, match="mixes the samples"):
        choose("auto", Mixes().train(), F.cross_entropy, images)
    with pytest.raises(PrivacyError, match=r"keeps statistics of its training images \(seen\)"):
        choose("auto", Remembers().train(), F.cross_entropy, images)
    with pytest.raises(PrivacyError, match=r"Set model.norm=group"):
        refuse_unsound(catalogue_model("mobilenetv3_small", norm="own"))
    with pytest.raises(PrivacyError, match="no parameter to train"):
        refuse_unsound(nn.Flatten())


def test_a_way_that_would_be_wrong_is_refused_by_name() -> None:
    images = torch.zeros(4, 1, 2, 2)
    for mode in ("hooks", "ghost"):
        with pytest.raises(PrivacyError, match=f"privacy.mode={mode} does not work with this network"):
            choose(mode, Overwrites().train(), F.cross_entropy, images)  # type: ignore[arg-type]
    for mode in ("functorch", "loop"):
        assert choose(mode, Overwrites().train(), F.cross_entropy, images)[0] == mode  # type: ignore[arg-type]
    model = small()
    assert choose("auto", model, F.cross_entropy, torch.zeros(4, 1, 4, 4))[0] == "loop"
    assert all(p.grad is None for p in model.parameters())


WORKS = {  # classification at 32 pixels with model.norm=group; what hooks and functorch say of each
    "small_cnn": {"hooks": True, "functorch": True},
    "mobilenetv3_small": {"hooks": True, "functorch": True},
    "shufflenetv2": {"hooks": True, "functorch": True},
    "convnext": {"hooks": False, "functorch": True},
}


@pytest.mark.parametrize("name", WORKS)
def test_the_table_of_what_works(name: str) -> None:
    model = catalogue_model(name)
    refuse_unsound(model)
    found = {}
    for mode in ("hooks", "functorch"):
        try:
            choose(mode, model, F.cross_entropy, torch.zeros(2, 1, 32, 32))[1].close()  # type: ignore[arg-type]
            found[mode] = True
        except PrivacyError:
            found[mode] = False
    assert found == WORKS[name]
