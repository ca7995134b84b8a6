"""timm's encoders in segmentation: under a U-Net decoder, PSPNet, HRNet. 2-D.

Shape legend: x is (B, C, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medray.errors import MissingDependencyError, ModelError
from medray.models.dropout import add_drop_path, drop_after
from medray.models.layers import resize
from medray.models.spec import ModelSpec, Request
from medray.models.timm_nets import check_timm_name


def _smp() -> Any:
    try:
        import segmentation_models_pytorch
    except ImportError:
        raise MissingDependencyError(
            "segmentation_models_pytorch", "pspnet and encoder:NAME", "pip install segmentation-models-pytorch"
        ) from None
    return segmentation_models_pytorch


def build_pspnet(request: Request) -> nn.Module:
    """PSPNet on ResNet-50: the scene at four scales, pooled."""
    return _smp().PSPNet(
        encoder_name="tu-resnet50",
        encoder_weights="imagenet" if request.hub else None,
        in_channels=request.in_channels,
        classes=request.num_outputs,
        psp_dropout=request.config.dropout,
        **_stochastic(request),
        encoder_depth=5,
        output_stride=8,
        upsampling=8,
    )


def build_encoder_unet(request: Request, encoder: str) -> nn.Module:
    """A timm encoder under a U-Net decoder.

    Raises:
        ModelError: the encoder gives no features at several resolutions.
    """
    smp = _smp()
    try:
        model = smp.Unet(
            encoder_name=f"tu-{encoder}",
            encoder_weights="imagenet" if request.hub else None,
            in_channels=request.in_channels,
            classes=request.num_outputs,
            **_stochastic(request),
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, AssertionError, IndexError) as error:
        if request.hub and isinstance(error, (ValueError, RuntimeError)):  # as the hub's client says that it failed
            raise
        raise ModelError(
            f"'{encoder}' can't be the encoder of a U-Net ({error}). Take a convolutional one, such as "
            f"'encoder:resnet34' or 'encoder:efficientnet_b0'"
        ) from error
    drop_after(model.decoder.blocks[-1].conv2, 2, request.config.dropout)
    return model


def _stochastic(request: Request) -> dict[str, float]:
    """timm's argument for stochastic depth, where it is asked for: not every network knows it."""
    return {"drop_path_rate": request.config.drop_path} if request.config.drop_path else {}


class HRNet(nn.Module):
    """Four resolutions kept side by side, joined at the finest (HRNetV2: Wang et al. 2020, arXiv:1908.07919)."""

    def __init__(self, backbone: nn.Module, channels: list[int], num_outputs: int, dropout: float) -> None:
        super().__init__()
        self.backbone = backbone
        joined = sum(channels)
        self.head = nn.Sequential(
            nn.Conv2d(joined, joined, 1, bias=False),
            nn.BatchNorm2d(joined),
            nn.ReLU(inplace=True),
            nn.Conv2d(joined, num_outputs, 1),
        )
        drop_after(self.head, 2, dropout)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        finest = features[0].shape[2:]
        joined = torch.cat([features[0], *(resize(f, finest) for f in features[1:])], dim=1)
        return resize(self.head(joined), x.shape[2:])


def build_hrnet(request: Request) -> nn.Module:
    """HRNet-W18 with the HRNetV2 head."""
    import timm

    backbone = timm.create_model(
        "hrnet_w18",
        pretrained=request.hub,
        in_chans=request.in_channels,
        features_only=True,
        feature_location="",
        out_indices=(1, 2, 3, 4),
    )
    add_drop_path(backbone, request.config.drop_path)
    return HRNet(backbone, backbone.feature_info.channels(), request.num_outputs, request.config.dropout)


def _halves(_depth: int) -> int:
    return 32


def any_encoder(name: str) -> ModelSpec:
    """The entry ``encoder:NAME``.

    Raises:
        ModelError: timm has no such network.
    """
    check_timm_name(name, "encoder")
    return ModelSpec(
        name=f"encoder:{name}",
        dense=True,
        ndims=(2,),
        tier="balanced",
        family="timm",
        description=f"{name} of timm under a U-Net decoder",
        build=lambda request: build_encoder_unet(request, name),
        options=frozenset({"dropout", "dropout_kind", "drop_path", "pretrained"}),
        stride=_halves,
        cells=2,
        hub=True,
    )


SPECS = (
    ModelSpec(
        name="pspnet",
        dense=True,
        ndims=(2,),
        tier="balanced",
        family="PSPNet",
        description="PSPNet on ResNet-50 (Zhao et al. 2017, arXiv:1612.01105)",
        build=build_pspnet,
        options=frozenset({"dropout", "dropout_kind", "drop_path", "pretrained"}),
        stride=lambda _depth: 8,
        cells=4,
        hub=True,
    ),
    ModelSpec(
        name="hrnet",
        dense=True,
        ndims=(2,),
        tier="high-accuracy",
        family="HRNet",
        description="HRNetV2-W18: four resolutions kept side by side (Wang et al. 2020)",
        build=build_hrnet,
        options=frozenset({"dropout", "dropout_kind", "drop_path", "pretrained"}),
        stride=_halves,
        cells=2,
        hub=True,
    ),
)
