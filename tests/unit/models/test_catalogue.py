"""The catalogue: names, refusals, and the contract that callers rely on."""

from __future__ import annotations

import pytest
import torch

from medray.config.schema import ModelConfig
from medray.errors import ModelError
from medray.models.catalogue import CATALOGUE, FAMILIES, build_model, count_parameters, lookup, names
from medray.models.spec import OPTIONS

ASKED = {
    "feature_size": 48,
    "depth": 4,
    "dropout": 0.1,
    "dropout_kind": "spatial",
    "drop_path": 0.1,
    "deep_supervision": True,
    "pretrained": "weights.safetensors",
    "elastic": {"level1": {"kernel": 5}},
}


def build(
    name: str, *, ndim: int = 2, side: int | None = 32, kind: str | None = None, **fields: object
) -> torch.nn.Module:
    return build_model(
        ModelConfig(name=name, **fields),
        kind=kind or lookup(name).kinds[0],
        ndim=ndim,
        in_channels=1,
        num_outputs=3,
        patch_size=None if side is None else (side,) * ndim,
    )


def test_every_name_is_listed_once() -> None:
    assert len(CATALOGUE) == sum(len(family) for family in FAMILIES)


LISTED = """
    mobilenetv3 efficientnet_b0 efficientnet_b3 efficientnet_b7 shufflenetv2 resnet18 resnet34 resnet50 resnet152
    densenet121 densenet201 vit_s vit_b vit_l deit convit swin convnext medvit small_cnn attention_cnn
    unet unetpp dynunet resenc_unet segresnet attention_unet unetr swin_unetr swin_unet transunet
    deeplabv3_mobilenet deeplabv3_resnet50 deeplabv3_resnet101 pspnet hrnet bisenet
"""


@pytest.mark.parametrize("wanted", LISTED.split())
def test_the_issue_s_networks_are_there(wanted: str) -> None:
    spec = lookup(wanted)
    assert spec.tier in ("lightweight", "balanced", "high-accuracy")
    assert spec.description


def test_names_filter_by_task_and_dimensions() -> None:
    assert "unet" in names("segmentation", 3)
    assert "unet" not in names("classification")
    assert "bisenet" not in names("segmentation", 3)
    assert set(names("multilabel", 3)) == {n for n, s in CATALOGUE.items() if "multilabel" in s.kinds and 3 in s.ndims}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("unt", "unet"),
        ("resnet-18", "resnet18"),
        ("timm:resnet19", "timm:resnet18"),
        ("encoder:resnet33", "encoder:resnet34"),
    ],
)
def test_an_unknown_name_gets_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ModelError, match="Did you mean") as caught:
        lookup(wrong)
    assert repr(right) in str(caught.value)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_field_that_a_network_lacks_is_refused(name: str, option: str) -> None:
    spec = CATALOGUE[name]
    config = ModelConfig(name=name, **{option: ASKED[option]})
    if option in spec.options:
        spec.check(config, kind=spec.kinds[0], ndim=spec.ndims[0], patch_size=None)
        return
    with pytest.raises(ModelError, match=f"has no field '{option}'"):
        spec.check(config, kind=spec.kinds[0], ndim=spec.ndims[0], patch_size=None)


def test_the_wrong_task_or_dimensions_are_refused() -> None:
    with pytest.raises(ModelError, match="does segmentation, not classification"):
        build("unet", kind="classification")
    with pytest.raises(ModelError, match="takes 2-D images, not 3-D"):
        build("bisenet", ndim=3)


def test_a_patch_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(ModelError, match=r"multiple of 16 and at least 32. Take \(48, 48\)"):
        build("unet", side=40)
    build("unet", side=48, feature_size=4)


def test_widths_and_depths_are_checked() -> None:
    with pytest.raises(ModelError, match="multiple of 12"):
        build("swin_unetr", feature_size=16)
    with pytest.raises(ModelError, match="too shallow"):
        build("dynunet", depth=2)
    with pytest.raises(ModelError, match="num_outputs=0"):
        build_model(ModelConfig(), kind="segmentation", ndim=2, in_channels=1, num_outputs=0, patch_size=None)


def test_a_depth_that_fits_the_patch() -> None:
    unet = lookup("unet")
    assert unet.fitting_depth((40, 56, 40)) == 4
    assert unet.fitting_depth((512, 512)) == 6
    assert unet.fitting_depth((4, 4)) == 2
    assert lookup("bisenet").fitting_depth((512, 512)) == 0
    assert unet.divisor(ModelConfig(depth=4), 3) == 8
    assert unet.smallest(ModelConfig(depth=4), 3) == 16


def test_parameters_are_counted_without_building() -> None:
    built = sum(p.numel() for p in build("small_cnn", side=None).parameters())
    assert count_parameters("small_cnn", 2, num_outputs=3) == built
    assert count_parameters("vit_l", 2) > 3e8


def test_an_image_that_cannot_be_cut_into_tokens_is_refused_with_a_size_that_can() -> None:
    with pytest.raises(ModelError, match=r"Take preprocess.size=\(44, 44\)"):
        build("vit_s", side=41)
    with pytest.raises(ModelError, match=r"Take preprocess.size=\(30, 30\)"):
        build("swin", side=29)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenetv3", "shufflenetv2", "convnext"])
@pytest.mark.parametrize(("side", "stride"), [(32, 8), (64, 16), (128, 32)])
def test_small_images_keep_their_resolution_longer(name: str, side: int, stride: int) -> None:
    model = build(name, side=side).eval()
    seen: list[torch.Size] = []
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[2:]))
    with torch.no_grad():
        model(torch.randn(1, 1, side, side))
    grids = [n for shape in seen for n in shape if n > 1]
    # The deepest grid of MobileNet's squeeze convolutions is 1: those are left out above.
    assert min(grids) == side // stride


def test_another_timm_network_by_name() -> None:
    model = build("timm:resnet10t", side=28, dropout=0.1).eval()
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    with pytest.raises(ModelError, match="timm can't build"):
        build("timm:densenet121", drop_path=0.1)


def test_an_encoder_that_is_none_is_refused() -> None:
    with pytest.raises(ModelError, match="can't be the encoder of a U-Net"):
        build("encoder:mixer_b16_224", side=64)
