"""Where it looked is where the evidence lies, in networks whose evidence is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medray.bundle import read
from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig
from medray.data.image import Image
from medray.errors import DataError, ModelError
from medray.explain.cam import explain
from medray.explain.layers import target_of
from medray.models.catalogue import build_model


class Bright(nn.Module):
    """Class 1 speaks for bright places, class 0 against: pooled to a coarse grid, then read."""

    def __init__(self, kind: str, ndim: int) -> None:
        super().__init__()
        conv, pool = (nn.Conv2d, nn.AvgPool2d) if ndim == 2 else (nn.Conv3d, nn.AvgPool3d)
        self.stem, self.pool, self.maps, self.head = conv(1, 1, 1), pool(4), conv(1, 3, 1), conv(3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.kind, self.mode = kind, "bilinear" if ndim == 2 else "trilinear"
        with torch.no_grad():
            for layer, weight, bias in (
                (self.stem, [[1.0]], [0.0]),
                (self.maps, [[1.0], [-1.0], [0.0]], [0.0, 0.0, 0.0]),
            ):
                layer.weight.copy_(torch.tensor(weight).reshape(layer.weight.shape))
                layer.bias.copy_(torch.tensor(bias))
            self.head.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).reshape(self.head.weight.shape))
            self.head.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.act(self.maps(self.pool(self.stem(x))))
        if self.kind == "segmentation":
            return nn.functional.interpolate(self.head(maps), size=x.shape[2:], mode=self.mode)
        return self.head(maps).flatten(2).amax(2)


@pytest.fixture(autouse=True)
def _bright_catalogue(monkeypatch):
    monkeypatch.setattr(read, "build_model", lambda config, *, kind, ndim, **_: Bright(kind, ndim))


def bundle_of(directory, kind, ndim, *, members=1, size=None, patch=None):
    return write_bundle(
        directory,
        kind=kind,
        ndim=ndim,
        channels=1,
        classes=["calm", "bright"],
        preprocess=PreprocessConfig(normalize="none", size=size),
        inference=InferenceSpec(patch_size=patch, divisor=4),
        models=[Bright(kind, ndim) for _ in range(members)],
        configs=[ModelConfig(name="unet")] * members,
        onnx=False,
    )


def scan(shape, at):
    array = np.zeros((1, *shape), dtype=np.float32)
    array[(0, *(slice(p, p + 6) for p in at))] = 4.0
    return Image(array=array, spacing=(1.0,) * len(shape))


CASES = [
    ("classification", 2, (40, 60), (30, 8), {"size": (32, 48)}),
    ("classification", 3, (24, 32, 28), (16, 4, 18), {"size": (24, 32, 24)}),
    ("segmentation", 2, (50, 70), (33, 52), {"patch": (32, 32)}),
    ("segmentation", 2, (50, 70), (6, 40), {}),
    ("segmentation", 3, (20, 24, 40), (4, 12, 30), {"patch": (16, 16, 16)}),
]


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
@pytest.mark.parametrize(("kind", "ndim", "shape", "at", "fields"), CASES)
def test_the_heat_lies_where_the_evidence_does(tmp_path, kind, ndim, shape, at, fields, method):
    image = scan(shape, at)
    found = explain(bundle_of(tmp_path / "b", kind, ndim, **fields), image, method=method)
    assert found.heat.shape == shape and found.heat.dtype == np.float32
    assert found.heat.min() >= 0 and found.heat.max() == pytest.approx(1.0)
    assert (found.target, found.target_name, found.method) == (1, "bright", method)
    hottest = np.array(np.unravel_index(found.heat.argmax(), shape))
    assert (np.abs(hottest - (np.array(at) + 3)) <= 6).all(), hottest
    bright = image.array[0] > 0
    assert found.heat[bright].mean() > 4 * found.heat[~bright].mean()


def test_a_class_can_be_named_and_an_ensemble_is_a_mean(tmp_path):
    image = scan((40, 60), (30, 8))
    bundle = bundle_of(tmp_path / "b", "classification", 2, size=(32, 48), members=2)
    one = explain(bundle, image, target="bright")
    assert one.target == explain(bundle, image, target=1).target == explain(bundle, image, target="1").target == 1
    alone = bundle_of(tmp_path / "c", "classification", 2, size=(32, 48))
    np.testing.assert_allclose(one.heat, explain(alone, image).heat, atol=1e-5)


def test_a_structure_that_is_not_there_has_no_heat(tmp_path):
    image = Image(array=np.zeros((1, 40, 40), np.float32), spacing=(1.0, 1.0))
    found = explain(bundle_of(tmp_path / "b", "segmentation", 2, patch=(32, 32)), image, target="bright")
    assert found.heat.shape == (40, 40) and not found.heat.any()


def test_the_model_is_left_as_it_was(tmp_path):
    bundle = bundle_of(tmp_path / "b", "classification", 2, size=(32, 48))
    model = bundle.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        explain(bundle, scan((40, 60), (30, 8)), model=model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_explained_is_said(tmp_path):
    bundle = bundle_of(tmp_path / "b", "classification", 2, size=(32, 48))
    image = scan((40, 60), (30, 8))
    with pytest.raises(ModelError, match="no method 'magic'"):
        explain(bundle, image, method="magic")
    for target in ("dark", 2, -1, "7"):
        with pytest.raises(ModelError, match="no class"):
            explain(bundle, image, target=target)
    with pytest.raises(DataError, match="3-D"):
        explain(bundle, scan((8, 8, 8), (1, 1, 1)))


@pytest.mark.parametrize(
    ("name", "kind", "ndim", "side", "grid"),
    [
        ("resnet18", "classification", 2, 64, (4, 4)),
        ("small_cnn", "classification", 3, 32, None),
        ("unet", "segmentation", 2, 32, None),
        ("timm:vit_tiny_patch16_224", "classification", 2, 64, (8, 8)),
    ],
)
def test_the_layer_of_real_networks_gives_coarse_maps(name, kind, ndim, side, grid):
    fields = {"feature_size": 8, "depth": 3} if name == "unet" else {}
    config = ModelConfig(name=name, **fields)
    shape = (side,) * ndim
    model = build_model(config, kind=kind, ndim=ndim, in_channels=1, num_outputs=2, patch_size=shape).eval()
    example = torch.randn(1, 1, *shape)
    found = target_of(model, example)
    outputs = []
    handle = found.layer.register_forward_hook(lambda module, given, out: outputs.append(out))
    with torch.no_grad():
        model(example)
    handle.remove()
    maps = found.reshape(outputs[-1]) if found.reshape else outputs[-1]
    assert maps.ndim == ndim + 2 and 1 < max(maps.shape[2:]) < side
    assert grid is None or tuple(maps.shape[2:]) == grid
    assert maps.shape[1] > 2, "no head"


def test_a_network_without_maps_is_refused():
    with pytest.raises(ModelError, match="no layer"):
        target_of(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.randn(1, 1, 4, 4))
