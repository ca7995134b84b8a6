"""DeepLabV3 with atrous spatial pyramid pooling (Chen et al. 2017, arXiv:1706.05587), by torchvision. 2-D.

Shape legend: x is (B, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medray.models.spec import ModelSpec, Request, Tier
from medray.models.weights import adapt_inputs, fetch_torchvision


class _Plain(nn.Module):
    """torchvision's network, giving the logits themselves instead of a dictionary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


def _build(request: Request, backbone: str) -> nn.Module:
    from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights, ResNet101_Weights
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, deeplabv3_resnet50, deeplabv3_resnet101
    from torchvision.models.segmentation.deeplabv3 import ASPPPooling

    make, weights = {
        "mobilenet": (deeplabv3_mobilenet_v3_large, MobileNet_V3_Large_Weights.IMAGENET1K_V2),
        "resnet50": (deeplabv3_resnet50, ResNet50_Weights.IMAGENET1K_V2),
        "resnet101": (deeplabv3_resnet101, ResNet101_Weights.IMAGENET1K_V2),
    }[backbone]
    network = make(weights=None, weights_backbone=None, num_classes=request.num_outputs)
    if request.hub:
        names = network.backbone.state_dict()
        found = {name.removeprefix("features."): part for name, part in fetch_torchvision(weights.url).items()}
        network.backbone.load_state_dict({name: found[name] for name in names})
    name, stem = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if request.in_channels != stem.in_channels:
        kernel, stride = stem.kernel_size[0], stem.stride[0]
        fitted = nn.Conv2d(request.in_channels, stem.out_channels, kernel, stride, kernel // 2, bias=False)
        with torch.no_grad():
            fitted.weight.copy_(adapt_inputs(stem.weight, request.in_channels))
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, fitted)
    if request.config.dropout:
        network.classifier[0].project[3] = nn.Dropout2d(request.config.dropout)  # in place of its own .5
    for part in network.modules():
        if isinstance(part, ASPPPooling):
            # One value a channel and image: batch normalisation can't train on a micro-batch of one.
            part[2] = nn.Identity()
    return _Plain(network)


def _spec(name: str, backbone: str, tier: Tier, description: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        dense=True,
        ndims=(2,),
        tier=tier,
        family="DeepLab",
        description=description,
        build=lambda request: _build(request, backbone),
        options=frozenset({"dropout", "dropout_kind", "pretrained"}),
        cells=32,
        hub=True,
    )


SPECS = (
    _spec("deeplabv3_mobilenet", "mobilenet", "lightweight", "DeepLabV3 on MobileNetV3-Large (Chen et al. 2017)"),
    _spec("deeplabv3_resnet50", "resnet50", "balanced", "DeepLabV3 on ResNet-50"),
    _spec("deeplabv3_resnet101", "resnet101", "high-accuracy", "DeepLabV3 on ResNet-101"),
)
