"""Every network of the catalogue, forwards and backwards, as small as it comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medray.config.schema import ModelConfig
from medray.models.catalogue import CATALOGUE, build_model, lookup
from medray.models.spec import ModelSpec

OTHERS = (
    "timm:convnext_atto",
    "timm:vit_tiny_patch16_224",
    "timm:regnetx_002",
    "encoder:resnet18",
    "encoder:convnext_atto",
)
HUGE = {"vit_l", "vit_b", "efficientnet_b7", "resnet34", "resnet152", "densenet201", "deeplabv3_resnet101"}
"""Same code as their smaller kin; built on the meta device only (test_catalogue counts their parameters)."""
ENTRIES = [(name, ndim) for name in (*CATALOGUE, *OTHERS) if name not in HUGE for ndim in lookup(name).ndims]


def tiny(name: str, **fields: object) -> tuple[ModelSpec, ModelConfig]:
    spec = lookup(name)
    if "feature_size" in spec.options:
        fields = {"feature_size": max(4, spec.feature_multiple)} | fields
    if "depth" in spec.options:
        fields = {"depth": max(3, spec.shallowest)} | fields
    return spec, ModelConfig(name=name, **fields)


def build_tiny(name: str, ndim: int, **fields: object) -> tuple[nn.Module, tuple[int, ...], bool]:
    spec, config = tiny(name, **fields)
    segments = spec.kinds == ("segmentation",)
    side = spec.smallest(config, ndim) if segments else 28 if ndim == 2 else 16
    shape = (side,) * ndim
    torch.manual_seed(0)
    model = build_model(config, kind=spec.kinds[0], ndim=ndim, in_channels=2, num_outputs=3, patch_size=shape)
    return model, shape, segments


@pytest.mark.parametrize(("name", "ndim"), ENTRIES)
def test_forward_and_backward(name: str, ndim: int) -> None:
    model, shape, segments = build_tiny(name, ndim)
    expected = (2, 3, *shape) if segments else (2, 3)
    logits = model.train()(torch.randn(2, 2, *shape))
    assert logits.shape == expected
    logits.square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "ndim"), ENTRIES)
def test_bf16_and_a_single_sample(name: str, ndim: int) -> None:
    model, shape, segments = build_tiny(name, ndim)
    x = torch.randn(1, 2, *shape)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(x)  # a micro-batch of one must train
        with torch.inference_mode():
            logits = model.eval()(x)
    assert logits.shape == ((1, 3, *shape) if segments else (1, 3))
    assert torch.isfinite(logits).all()


SUPERVISED = [(n, d) for n, s in CATALOGUE.items() if "deep_supervision" in s.options for d in s.ndims]


@pytest.mark.parametrize(("name", "ndim"), SUPERVISED)
def test_deep_supervision(name: str, ndim: int) -> None:
    model, shape, _ = build_tiny(name, ndim, deep_supervision=True)
    x = torch.randn(2, 2, *shape)
    outputs = model.train()(x)
    assert isinstance(outputs, list)
    assert len(outputs) >= 1
    assert outputs[0].shape == (2, 3, *shape)
    sizes = [o.shape[2] for o in outputs]
    assert sizes == sorted(sizes, reverse=True)
    torch.stack([o.mean() for o in outputs]).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert isinstance(model.eval()(x), Tensor)


def test_the_default_supervises_all_but_the_coarsest_decoded_level() -> None:
    model, shape, _ = build_tiny("unet", 3, depth=4, deep_supervision=True)
    outputs = model.train()(torch.randn(1, 2, *shape))
    assert [o.shape[2] for o in outputs] == [shape[0], shape[0] // 2]


NOISY = [
    (n, s.ndims[0], o)
    for n, s in CATALOGUE.items()
    for o in ("dropout", "drop_path")
    if o in s.options and n not in HUGE
]


@pytest.mark.parametrize(("name", "ndim", "option"), NOISY)
def test_regularisation_acts_in_training_only(name: str, ndim: int, option: str) -> None:
    model, shape, _ = build_tiny(name, ndim, **{option: 0.5})
    x = torch.randn(4, 2, *shape)
    with torch.no_grad():
        for part in model.modules():
            # Residual branches start silent in some families; let them speak, so that dropping them shows.
            for parameter in part.parameters(recurse=False):
                if not parameter.any():
                    parameter.normal_(std=0.5)
        first, second = model.train()(x), model(x)
        assert not torch.equal(first, second)
        assert torch.equal(model.eval()(x), model(x))


def test_a_unet_takes_any_multiple_of_its_divisor() -> None:
    model, _, _ = build_tiny("unet", 3)
    assert model.eval()(torch.randn(1, 2, 8, 16, 12)).shape == (1, 3, 8, 16, 12)


@pytest.mark.parametrize("name", ["unetr", "transunet", "swin_unetr", "swin_unet"])
def test_transformers_take_other_sizes_than_they_were_built_for(name: str) -> None:
    model, shape, _ = build_tiny(name, 3)
    longer = (shape[0], 2 * shape[1], 3 * shape[2])
    assert model.eval()(torch.randn(1, 2, *longer)).shape == (1, 3, *longer)


@pytest.mark.parametrize("name", ["unet", "resenc_unet", "small_cnn"])
def test_it_learns(name: str) -> None:
    """A few steps on one batch bring the loss well down."""
    model, shape, segments = build_tiny(name, 2, feature_size=8)
    x = torch.randn(4, 2, *(2 * n for n in shape))
    target = (x[:, 0] > 0).long() if segments else torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model.train()(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
