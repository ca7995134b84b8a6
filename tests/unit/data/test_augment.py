"""Augment: identities, geometry, masks that stay on their structures, determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medray.config.schema import AugmentConfig
from medray.data.augment import Augment, _spline_basis
from medray.data.manifest import IGNORE
from medray.errors import ConfigError

INTENSITY = ["brightness", "contrast", "gamma", "noise", "blur", "low_resolution"]
MEDICAL = ["bias_field", "ghosting", "spike", "histogram_shift"]
OFF: dict[str, Any] = {f"p_{name}": 0.0 for name in ["affine", "elastic", *INTENSITY, *MEDICAL]}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes(ndim: int, channels: int = 1, batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Ellipsoids on a smooth ground: images (B, C, *s) and masks (B, *s)."""
    size = (36, 44, 28)[:ndim]
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size], indexing="ij")
    inside = sum(((a - 0.1) / 0.5) ** 2 for a in axes) < 1
    image = inside.float() * 3 + 0.3 * axes[0]
    return image.repeat(batch, channels, *[1] * ndim), inside.long().repeat(batch, *[1] * ndim)


def only(ndim: int, **config: Any) -> Augment:
    return Augment(AugmentConfig(**{**OFF, **config}), ndim=ndim)


@pytest.mark.parametrize("ndim", [2, 3])
def test_strength_zero_is_the_identity(ndim: int) -> None:
    images, masks = shapes(ndim)
    everything = dict.fromkeys(OFF, 1.0)
    augment = Augment(AugmentConfig(**everything, flip_axes=(0, 1), p_flip=1.0, strength=0.0), ndim=ndim)
    out, labels = augment(images, masks, generator())
    assert labels is not None and torch.equal(out, images) and torch.equal(labels, masks)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", ["affine", "elastic", *INTENSITY, *MEDICAL])
def test_every_transform_grows_with_strength(ndim: int, name: str) -> None:
    images, _ = shapes(ndim, channels=2, batch=8)
    images += 0.1 * torch.randn(images.shape, generator=generator())
    change = []
    for strength in (0.01, 0.3, 1.0):
        out, _ = only(ndim, **{f"p_{name}": 1.0, "strength": strength})(images, None, generator(1))
        assert out.shape == images.shape and out.isfinite().all() and out.dtype == torch.float32
        change.append((out - images).abs().mean().item())
    assert change[0] < 0.05 * images.std() or change[0] < 0.2 * change[2]
    assert change[0] < change[2] and change[1] < change[2]
    assert change[2] > 0.003


@pytest.mark.parametrize("ndim", [2, 3])
def test_masks_stay_on_their_structures(ndim: int) -> None:
    images, masks = shapes(ndim, batch=16)
    out, labels = only(ndim, p_affine=1.0, p_elastic=1.0, flip_axes=(0,))(images, masks, generator())
    assert labels is not None and labels.dtype == masks.dtype
    seen = labels != IGNORE
    structure = (out[:, 0] > 1.5) & seen
    agree = (structure == (labels == 1))[seen].float().mean()
    assert agree > 0.985
    assert set(labels.unique().tolist()) == {0, 1, IGNORE}
    assert not torch.equal(labels, masks)


def test_out_of_field_is_ignored_and_nothing_else() -> None:
    images, masks = torch.ones(1, 1, 40, 40), torch.ones(1, 40, 40)
    shift = only(2, p_affine=1.0, rotate_deg=0.0, shear_deg=0.0, scale=(1.0, 1.0), translate=0.25)
    _, labels = shift(images, masks, generator(3))
    assert labels is not None
    rows, columns = (labels[0] == IGNORE).all(dim=1), (labels[0] == IGNORE).all(dim=0)
    expected = rows[:, None] | columns[None, :]
    assert torch.equal(labels[0] == IGNORE, expected) and expected.any() and not expected.all()


def test_a_wider_field_shows_what_lies_beyond_the_patch() -> None:
    images, masks = torch.randn(8, 1, 40, 40), torch.ones(8, 40, 40)
    augment = only(2, p_affine=0.5, translate=0.0)
    assert augment.field((32, 32)) == (40, 40)
    out, labels = augment(images, masks, generator(), size=(32, 32))
    assert labels is not None and out.shape == (8, 1, 32, 32) and labels.shape == (8, 32, 32)
    assert (labels == IGNORE).float().mean() < 0.002
    still = [i for i in range(8) if torch.equal(out[i], images[i, :, 4:36, 4:36])]
    assert 0 < len(still) < 8


def test_a_field_changes_nothing_but_the_border() -> None:
    """The same draw on the patch alone and with a field around it agrees in the middle."""
    images, _ = shapes(2)
    augment = only(2, p_affine=1.0, p_elastic=1.0)
    narrow, _ = augment(images[..., 4:32, 5:39], None, generator(5))
    wide, _ = augment(images, None, generator(5), size=(28, 34))
    torch.testing.assert_close(wide[..., 10:18, 12:22], narrow[..., 10:18, 12:22], atol=1e-3, rtol=0)


def test_rotation_is_one_in_millimetres() -> None:
    """In voxels of 1 x 4 mm, a disc in millimetres stays a disc."""
    rows, columns = torch.meshgrid(torch.arange(80) - 39.5, (torch.arange(20) - 9.5) * 4, indexing="ij")
    disc = ((rows**2 + columns**2).sqrt() < 25).float()
    config = AugmentConfig(
        **{**OFF, "p_affine": 1.0, "rotate_deg": 90.0, "translate": 0, "scale": (1, 1), "shear_deg": 0}
    )
    out, _ = Augment(config, ndim=2, spacing=(1.0, 4.0))(disc.repeat(8, 1, 1, 1), None, generator())
    assert (out - disc).abs().mean() < 0.03
    blind, _ = Augment(config, ndim=2)(disc.repeat(8, 1, 1, 1), None, generator())
    assert (blind - disc).abs().mean() > 0.1


def test_elastic_displacements_do_not_fold() -> None:
    augment = only(3, p_elastic=1.0)
    field = augment._displacements(4, (30, 30, 30), generator()) * 15  # in voxels
    step = torch.stack([field.diff(dim=axis)[:, :29, :29, :29] for axis in (3, 2, 1)], dim=-1)
    jacobian = torch.eye(3) + step
    assert (torch.linalg.det(jacobian) > 0).all()
    assert field.abs().max() > 0.5


def test_spline_weights_sum_to_one() -> None:
    torch.testing.assert_close(_spline_basis(37).sum(dim=1), torch.ones(37))


@pytest.mark.parametrize("ndim", [2, 3])
def test_same_generator_same_batch_and_arguments_untouched(ndim: int) -> None:
    images, masks = shapes(ndim, channels=2)
    copies = images.clone(), masks.clone()
    augment = Augment(AugmentConfig(**dict.fromkeys(OFF, 0.5), flip_axes=(0, 1)), ndim=ndim)
    first, second = augment(images, masks, generator(9)), augment(images, masks, generator(9))
    other = augment(images, masks, generator(10))
    assert torch.equal(first[0], second[0]) and first[1] is not None and torch.equal(first[1], second[1])  # type: ignore[arg-type]
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, copies[0]) and torch.equal(masks, copies[1])


def test_samples_are_drawn_one_by_one() -> None:
    images = torch.zeros(2000, 1, 4, 4)
    images[..., 0, 0] = 1
    out, _ = only(2, p_brightness=0.3)(images, None, generator())
    changed = (out != images).flatten(1).any(dim=1).float().mean().item()
    assert changed == pytest.approx(0.3, abs=0.04)


def test_flips_are_exact() -> None:
    images, masks = torch.randn(4, 2, 6, 5, 4), torch.randint(0, 3, (4, 6, 5, 4))
    out, labels = only(3, flip_axes=(0, 2), p_flip=1.0)(images, masks, generator())
    assert torch.equal(out, images.flip(2, 4)) and labels is not None and torch.equal(labels, masks.flip(1, 3))


@pytest.mark.parametrize("name", [*INTENSITY, *MEDICAL])
def test_a_constant_image_stays_finite(name: str) -> None:
    out, _ = only(2, **{f"p_{name}": 1.0})(torch.full((3, 1, 16, 16), 2.5), None, generator())
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [(1, 9), (7, 1), (5, 3)])
def test_tiny_images(size: tuple[int, int]) -> None:
    everything = Augment(AugmentConfig(**dict.fromkeys(OFF, 1.0)), ndim=2)
    out, labels = everything(torch.randn(2, 1, *size), torch.zeros(2, *size), generator())
    assert out.isfinite().all() and labels is not None and labels.shape == (2, *size)


def test_configurations_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="0 to 1"):
        only(2, flip_axes=(2,))
    with pytest.raises(ConfigError, match="must not be above"):
        only(2, scale=(1.2, 0.8))


# Policies ------------------------------------------------------------------------------------------------------------


def counted(**config: Any) -> torch.Tensor:
    """How many transforms each of 400 samples got: every transform adds 1 to the image."""
    augment = only(2, **{"strength": 1.0, **config})
    names = [step.__name__ for _, step in augment._steps]
    augment._steps = [(p, _adds_one(name)) for (p, _), name in zip(augment._steps, names, strict=True)]
    images = torch.zeros(400, 1, 8, 8)
    out, _ = augment(images, None, generator(3))
    return out[:, 0, 0, 0]


def _adds_one(name: str) -> Any:
    def step(images: torch.Tensor, _generator: torch.Generator) -> torch.Tensor:
        return images + 1

    step.__name__ = name
    return step


SOME = {"p_brightness": 0.01, "p_contrast": 0.5, "p_gamma": 0.2, "p_noise": 0.1, "p_blur": 1.0}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"policy": "rand", "policy_count": 3}, 3),
        ({"policy": "trivial", "policy_count": 3}, 1),
        ({"policy": "rand", "policy_count": 16}, 5),  # there are no more
    ],
    ids=str,
)
def test_a_policy_gives_each_sample_so_many(config: Any, count: int) -> None:
    assert (counted(**SOME, **config) == count).all()


def test_a_policy_takes_its_share_of_the_samples() -> None:
    found = counted(**SOME, policy="rand", policy_count=2, p_policy=0.3)
    assert set(found.tolist()) == {0, 2} and 0.2 < (found > 0).float().mean() < 0.4


def test_a_policy_draws_all_that_have_a_probability_alike_and_no_others() -> None:
    augment = only(2, **SOME, policy="trivial", flip_axes=(1,), p_flip=0.5, p_elastic=0.001)
    drawn = augment._lot(6000, generator())
    shares = {name: drawn(name, 0.0).float().mean().item() for name in augment._names}
    assert len(shares) == 7 and all(abs(share - 1 / 7) < 0.03 for share in shares.values())
    assert not drawn("_spike", 1.0).any() and not drawn("affine", 1.0).any()


@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_a_policy_of_nothing_is_the_identity_and_draws_the_same_again(policy: str) -> None:
    images, masks = shapes(2)
    out, labels = only(2, policy=policy)(images, masks, generator())
    assert torch.equal(out, images) and labels is not None and masks is not None and torch.equal(labels, masks)
    moving = only(2, policy=policy, p_affine=0.1, p_noise=0.1, p_elastic=0.1)
    first, second = moving(images, masks, generator(5)), moving(images, masks, generator(5))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], images)
