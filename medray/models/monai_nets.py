"""MONAI's networks: DynUNet and SegResNet for segmentation, ResNet and DenseNet for 3-D classification."""

from __future__ import annotations

from torch import Tensor, nn

from medray.models.dropout import add_drop_path
from medray.models.layers import replace_instance_norms, widths
from medray.models.spec import ModelSpec, Request
from medray.models.unet import DEPTH, halvings

_SMALL, _MEDIUM = 32, 96
"""Up to so many voxels along the shortest axis a 3-D classifier's stem halves the resolution not at all, or once."""


class _Supervised(nn.Module):
    """MONAI's DynUNet, with its stacked outputs (B, L, K, *spatial) as the catalogue's list of L logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = self.network(x)
        return list(y.unbind(dim=1)) if self.training else y


def build_dynunet(request: Request) -> nn.Module:
    """DynUNet: MONAI's rendering of nnU-Net."""
    from monai.networks.nets import DynUNet

    depth, ndim = request.depth, request.ndim
    strides = [1] + [2] * (depth - 1)
    supervised = request.config.deep_supervision
    network = DynUNet(
        spatial_dims=ndim,
        in_channels=request.in_channels,
        out_channels=request.num_outputs,
        kernel_size=[3] * depth,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=widths(request.feature_size, depth, ndim),
        dropout=request.config.dropout or None,
        norm_name=("INSTANCE", {"affine": True}),
        deep_supervision=supervised,
        deep_supr_num=max(1, depth - 2),
    )
    replace_instance_norms(network)
    return _Supervised(network) if supervised else network


def build_segresnet(request: Request) -> nn.Module:
    """SegResNet: residual blocks with group norm, the winner of BraTS 2018."""
    from monai.networks.nets import SegResNet

    network = SegResNet(
        spatial_dims=request.ndim,
        init_filters=request.feature_size,
        in_channels=request.in_channels,
        out_channels=request.num_outputs,
        dropout_prob=request.config.dropout or None,
        blocks_down=(1, 2, 2, 4, 4, 4, 4, 4)[: request.depth],
        blocks_up=(1,) * (request.depth - 1),
    )
    return add_drop_path(network, request.config.drop_path)


def build_classifier(request: Request, name: str) -> nn.Module:
    """A 3-D ResNet (Hara et al. 2018, arXiv:1711.09577) or DenseNet, its stem fitted to the patch size."""
    shortest = _MEDIUM + 1 if request.patch_size is None else min(request.patch_size)
    stride, pool = (1 if shortest <= _SMALL else 2), shortest > _MEDIUM
    build = _densenet if name.startswith("densenet") else _resnet
    return build(request, name, stride, pool)


def _resnet(request: Request, name: str, stride: int, pool: bool) -> nn.Module:
    from monai.networks.nets import ResNet

    layers = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}
    model = ResNet(
        block="basic" if name in ("resnet18", "resnet34") else "bottleneck",
        layers=list(layers[name]),
        block_inplanes=[64, 128, 256, 512],
        spatial_dims=request.ndim,
        n_input_channels=request.in_channels,
        conv1_t_size=7 if pool else 3,
        conv1_t_stride=stride,
        no_max_pool=not pool,
        num_classes=request.num_outputs,
        bias_downsample=False,
    )
    if request.config.dropout:
        model.fc = nn.Sequential(nn.Dropout(request.config.dropout), model.fc)
    return add_drop_path(model, request.config.drop_path)


def _densenet(request: Request, name: str, stride: int, pool: bool) -> nn.Module:
    from monai.networks.nets import DenseNet

    model = DenseNet(
        spatial_dims=request.ndim,
        in_channels=request.in_channels,
        out_channels=request.num_outputs,
        block_config={"densenet121": (6, 12, 24, 16), "densenet201": (6, 12, 48, 32)}[name],
    )
    if not pool:
        model.features.conv0 = nn.Conv3d(request.in_channels, 64, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(model.features.conv0.weight)
        model.features.pool0 = nn.Identity()
    if request.config.dropout:
        model.class_layers.out = nn.Sequential(nn.Dropout(request.config.dropout), model.class_layers.out)
    return model


SPECS = (
    ModelSpec(
        name="dynunet",
        dense=True,
        ndims=(2, 3),
        tier="balanced",
        family="U-Net",
        description="MONAI's DynUNet, with deep supervision (Isensee et al. 2019)",
        build=build_dynunet,
        options=frozenset({"feature_size", "depth", "dropout", "dropout_kind", "deep_supervision", "pretrained"}),
        feature_size=32,
        depth=DEPTH,
        shallowest=3,
        stride=halvings,
        cells=2,
    ),
    ModelSpec(
        name="segresnet",
        dense=True,
        ndims=(2, 3),
        tier="balanced",
        family="ResNet",
        description="SegResNet, residual encoder with group norm (Myronenko 2018)",
        build=build_segresnet,
        options=frozenset({"feature_size", "depth", "dropout", "dropout_kind", "drop_path", "pretrained"}),
        feature_size=16,
        feature_multiple=8,
        depth={2: 4, 3: 4},
        stride=halvings,
        cells=2,
    ),
)
