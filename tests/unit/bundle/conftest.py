"""A bundle of a tiny network, written once; its catalogue holds that network alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from medray.bundle import read
from medray.bundle.read import Bundle
from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig


class Tiny(nn.Module):
    """One convolution for each level of nothing: (B, C, *s) to (B, K[, *s])."""

    def __init__(self, kind: str, ndim: int, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        conv = nn.Conv2d if ndim == 2 else nn.Conv3d
        self.first, self.last, self.kind = conv(channels, width, 3, padding=1), conv(width, outputs, 1), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(torch.relu(self.first(x)))
        return y if self.kind == "segmentation" else y.flatten(2).mean(2)


def build_tiny(config, *, kind, ndim, in_channels, num_outputs, patch_size):
    return Tiny(kind, ndim, in_channels, num_outputs, config.feature_size or 4)


@pytest.fixture(scope="module", autouse=True)
def tiny_catalogue():
    # Not for the session: the tests that come after this folder build real networks.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "build_model", build_tiny)
        yield


def _write(directory: Path, kind="segmentation", *, ndim=2, outputs=3, members=1, onnx=False, **fields) -> Bundle:
    """A bundle of ``members`` tiny networks of different weights."""
    torch.manual_seed(0)
    config = ModelConfig(name="tiny", feature_size=4)
    models = [
        build_tiny(config, kind=kind, ndim=ndim, in_channels=1, num_outputs=outputs, patch_size=None)
        for _ in range(members)
    ]
    size = (16,) * ndim
    given = {
        "preprocess": PreprocessConfig(size=None if kind == "segmentation" else size),
        "inference": InferenceSpec(patch_size=size if kind == "segmentation" else None),
        "classes": [f"class {index}" for index in range(outputs)],
        "name": "tiny",
    } | fields
    return write_bundle(
        directory, kind=kind, ndim=ndim, channels=1, models=models, configs=[config] * members, onnx=onnx, **given
    )


@pytest.fixture(scope="session")
def write_tiny():
    """write_tiny(directory, kind="segmentation", *, ndim, outputs, members, onnx, **fields of write_bundle)."""
    return _write


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tiny_catalogue) -> Path:
    """A segmentation bundle without ONNX: read only."""
    return _write(tmp_path_factory.mktemp("pristine") / "bundle").directory


@pytest.fixture
def bundle_dir(pristine, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))
