"""2-D classifiers of timm, and torchvision's ShuffleNetV2, fitted to small images; 3-D twins where MONAI has them.

Backbones are drawn for 224 pixels and throw three quarters of the pixels away twice before they look. At 28 pixels
that leaves nothing to look at, so that stems keep more of them: see :func:`stem_reductions` and :func:`token_size`.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from medray.errors import ModelError
from medray.models import monai_nets
from medray.models.spec import ModelSpec, Request, Tier
from medray.models.weights import adapt_inputs, fetch_torchvision

_STEMS = ("conv_stem", "conv1", "stem", "maxpool", "features.conv0", "features.pool0", "blocks.1.0.conv_dw")
"""Where timm's convolutional networks first lose resolution, off any residual branch."""
_SMALL, _MEDIUM = 48, 96
_OPTIONS = frozenset({"dropout", "drop_path", "pretrained"})


def stem_reductions(patch_size: tuple[int, ...] | None) -> int:
    """How many of a stem's two halvings to leave out: both up to 48 pixels, one up to 96."""
    if patch_size is None or min(patch_size) > _MEDIUM:
        return 0
    return 2 if min(patch_size) <= _SMALL else 1


def token_size(patch_size: tuple[int, ...], *, grid: int = 7, largest: int = 16) -> int:
    """Pixels along a token's side: the largest divisor of all axes that leaves at least ``grid`` tokens along the
    shortest.

    Raises:
        ModelError: no such divisor (a prime side, or an image below twice ``grid``).
    """
    for pixels in range(largest, 1, -1):
        if all(n % pixels == 0 for n in patch_size) and min(patch_size) // pixels >= grid:
            return pixels
    fits = tuple(max(-(-n // 4) * 4, 4 * grid) for n in patch_size)
    raise ModelError(
        f"image size {patch_size} can't be cut into equal tokens with at least {grid} along the shortest side. "
        f"Take preprocess.size={fits}"
    )


def keep_resolution(model: nn.Module, times: int, *, keep_kernels: bool) -> nn.Module:
    """Take the first ``times`` halvings out of a convolutional stem.

    Args:
        model: a timm network.
        times: halvings to take out.
        keep_kernels: keep 7x7 kernels (for pretrained weights); otherwise 3x3 replaces them, as suits few pixels.
    """
    for name, part in list(model.named_modules()):
        if times == 0:
            break
        if not any(name == stem or name.startswith(stem + ".") for stem in _STEMS):
            continue
        if isinstance(part, nn.Conv2d) and max(part.stride) == 2:
            part.stride = (1, 1)
            if part.kernel_size == (7, 7) and not keep_kernels:
                small = nn.Conv2d(part.in_channels, part.out_channels, 3, 1, 1, bias=part.bias is not None)
                nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
                _replace(model, name, small)
        elif isinstance(part, nn.Conv2d) and part.stride == part.kernel_size == (4, 4):
            # A stem of tokens (ConvNeXt): let them overlap.
            part.stride = (4 >> times,) * 2
            part.padding = (1, 1) if times == 1 else "same"
            break
        elif isinstance(part, (nn.MaxPool2d, nn.AvgPool2d)):
            _replace(model, name, nn.Identity())
        else:
            continue
        times -= 1
    return model


def _replace(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, part)


def build_timm(request: Request, backbone: str) -> nn.Module:
    """A timm classifier with its stem or tokens fitted to ``request.patch_size``.

    Raises:
        ModelError: timm refuses one of the arguments for this network.
    """
    import timm

    config = request.config
    arguments: dict[str, Any] = {"in_chans": request.in_channels, "num_classes": request.num_outputs}
    arguments |= {"drop_rate": config.dropout} if config.dropout else {}
    arguments |= {"drop_path_rate": config.drop_path} if config.drop_path else {}
    reductions = stem_reductions(request.patch_size)
    tokens = timm.get_pretrained_cfg(backbone)
    if request.patch_size is not None and tokens is not None and tokens.fixed_input_size:
        arguments |= {"img_size": request.patch_size} | _tokens(backbone, request.patch_size)
        reductions = 0
    try:
        model = timm.create_model(backbone, pretrained=request.hub, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        if request.hub and isinstance(error, ValueError):  # as the hub's client says that there is no such file
            raise
        settings = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ModelError(
            f"timm can't build '{backbone}' with {settings}: {error}. Change the image size (preprocess.size), leave "
            f"model.dropout and model.drop_path out, or choose another model"
        ) from error
    return keep_resolution(model, reductions, keep_kernels=config.pretrained is not None)


def _tokens(backbone: str, patch_size: tuple[int, ...]) -> dict[str, int]:
    """timm's ``patch_size`` (pixels a token) for this image size."""
    if "patch" not in backbone:
        return {}
    if "swin" in backbone:
        # Four levels: 2 pixels a token up to 96, so that the deepest still has a grid; windows are padded by timm.
        pixels = 2 if min(patch_size) <= _MEDIUM else 4
        if any(n % pixels for n in patch_size):
            raise ModelError(
                f"image size {patch_size} is no multiple of {pixels}, the size of {backbone}'s tokens. "
                f"Take preprocess.size={tuple(-(-n // pixels) * pixels for n in patch_size)}"
            )
        return {"patch_size": pixels}
    return {"patch_size": token_size(patch_size)}


def build_shufflenet(request: Request) -> nn.Module:
    """torchvision's ShuffleNetV2 x1.0 (timm has none)."""
    from torchvision.models import ShuffleNet_V2_X1_0_Weights, shufflenet_v2_x1_0

    model = shufflenet_v2_x1_0(weights=None)
    if request.hub:
        model.load_state_dict(fetch_torchvision(ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.url))
    stem = model.conv1[0]
    if request.in_channels != stem.in_channels:
        fitted = nn.Conv2d(request.in_channels, stem.out_channels, 3, 2, 1, bias=False)
        if request.hub:
            fitted.weight.data.copy_(adapt_inputs(stem.weight.data, request.in_channels))
        model.conv1[0] = fitted
    model.fc = nn.Sequential(nn.Dropout(request.config.dropout), nn.Linear(model.fc.in_features, request.num_outputs))
    return keep_resolution(model, stem_reductions(request.patch_size), keep_kernels=True)


def _spec(
    name: str,
    backbone: str,
    tier: Tier,
    family: str,
    description: str,
    *,
    options: frozenset[str] = _OPTIONS,
    volumes: bool = False,
) -> ModelSpec:
    def build(request: Request) -> nn.Module:
        if request.ndim == 3:
            return monai_nets.build_classifier(request, name)
        return build_timm(request, backbone)

    return ModelSpec(
        name=name,
        dense=False,
        ndims=(2, 3) if volumes else (2,),
        tier=tier,
        family=family,
        description=description,
        build=build,
        options=options,
        cells=16,
        hub=True,
    )


_NO_PATH = frozenset({"dropout", "pretrained"})

SPECS = (
    _spec("mobilenetv3", "mobilenetv3_large_100", "lightweight", "MobileNet", "MobileNetV3-Large (Howard et al. 2019)"),
    _spec("mobilenetv3_small", "mobilenetv3_small_100", "lightweight", "MobileNet", "MobileNetV3-Small"),
    _spec("efficientnet_b0", "efficientnet_b0", "lightweight", "EfficientNet", "EfficientNet-B0 (Tan and Le 2019)"),
    _spec("efficientnet_b3", "efficientnet_b3", "balanced", "EfficientNet", "EfficientNet-B3"),
    _spec("efficientnet_b7", "efficientnet_b7", "high-accuracy", "EfficientNet", "EfficientNet-B7"),
    ModelSpec(
        name="shufflenetv2",
        dense=False,
        ndims=(2,),
        tier="lightweight",
        family="ShuffleNet",
        description="ShuffleNetV2 x1.0 of torchvision (Ma et al. 2018)",
        build=build_shufflenet,
        options=_NO_PATH,
        cells=16,
        hub=True,
    ),
    _spec("resnet18", "resnet18", "lightweight", "ResNet", "ResNet-18 (He et al. 2016)", volumes=True),
    _spec("resnet34", "resnet34", "balanced", "ResNet", "ResNet-34", volumes=True),
    _spec("resnet50", "resnet50", "balanced", "ResNet", "ResNet-50", volumes=True),
    _spec("resnet152", "resnet152", "high-accuracy", "ResNet", "ResNet-152", volumes=True),
    _spec(
        "densenet121",
        "densenet121",
        "balanced",
        "DenseNet",
        "DenseNet-121 (Huang et al. 2017)",
        options=_NO_PATH,
        volumes=True,
    ),
    _spec("densenet201", "densenet201", "high-accuracy", "DenseNet", "DenseNet-201", options=_NO_PATH, volumes=True),
    _spec("vit_s", "vit_small_patch16_224", "balanced", "ViT", "Vision Transformer S (Dosovitskiy et al. 2021)"),
    _spec("vit_b", "vit_base_patch16_224", "high-accuracy", "ViT", "Vision Transformer B"),
    _spec("vit_l", "vit_large_patch16_224", "high-accuracy", "ViT", "Vision Transformer L"),
    _spec("deit", "deit_small_patch16_224", "balanced", "ViT", "DeiT-S (Touvron et al. 2021)"),
    _spec("convit", "convit_small", "balanced", "ViT", "ConViT-S (d'Ascoli et al. 2021)"),
    _spec("swin", "swin_tiny_patch4_window7_224", "balanced", "Swin", "Swin-T (Liu et al. 2021)"),
    _spec("convnext", "convnext_tiny", "balanced", "ConvNeXt", "ConvNeXt-T (Liu et al. 2022)"),
)


def check_timm_name(name: str, prefix: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ModelError: with the nearest names.
    """
    import timm

    if timm.is_model(name.partition(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(f'{prefix}:{n}') for n in near)}?" if near else "timm.list_models() has all"
    raise ModelError(f"timm has no network '{name}' (asked as '{prefix}:{name}'). {hint}")


def any_backbone(name: str) -> ModelSpec:
    """The entry ``timm:NAME``.

    Raises:
        ModelError: timm has no such network.
    """
    check_timm_name(name, "timm")
    return _spec(f"timm:{name}", name, "balanced", "timm", f"{name} of timm")
