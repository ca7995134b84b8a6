"""ONNX with a dynamic batch, run by ONNX Runtime, for the defaults and one network of each kind of layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from medray.config.genotype import CELLS, Genotype
from medray.config.schema import ModelConfig
from medray.models.catalogue import build_model, lookup

EDGES = [[[0, "sep3"], [1, "skip"]], [[0, "avg3"], [2, "max3"]], [[1, "dil3"], [3, "sep5"]]]
SEARCHED = {
    kind: Genotype.model_validate({"kind": kind, "cells": dict.fromkeys(cells, EDGES)}).name
    for kind, cells in CELLS.items()
}
DEFAULTS = [("unet", 2), ("unet", 3), ("resnet18", 2), ("small_cnn", 2)]
LAYERS = [
    ("resenc_unet", 2),
    ("attention_unet", 3),
    ("unetpp", 2),
    ("dynunet", 3),
    ("segresnet", 3),
    ("swin_unetr", 3),
    ("transunet", 2),
    ("pspnet", 2),
    ("bisenet", 2),
    ("attention_cnn", 3),
    ("timm:vit_tiny_patch16_224", 2),
    ("elastic_unet", 3),
    pytest.param(SEARCHED["classification"], 2, id="searched classifier"),
    pytest.param(SEARCHED["segmentation"], 3, id="searched U-Net"),
]


@pytest.mark.parametrize(("name", "ndim"), [*DEFAULTS, *LAYERS])
def test_onnx_runtime_agrees_with_torch(name: str, ndim: int, tmp_path: Path) -> None:
    spec = lookup(name)
    fields = {"feature_size": max(4, spec.feature_multiple)} if "feature_size" in spec.options else {}
    fields |= {"depth": max(3, spec.shallowest)} if "depth" in spec.options else {}
    config = ModelConfig(name=name, **fields)
    side = spec.smallest(config, ndim) if spec.kinds == ("segmentation",) else 28 if ndim == 2 else 16
    shape = (side,) * ndim
    torch.manual_seed(0)
    model = build_model(config, kind=spec.kinds[0], ndim=ndim, in_channels=2, num_outputs=3, patch_size=shape)
    model(torch.randn(2, 2, *shape))  # batch statistics of their own
    model.eval()

    program = torch.onnx.export(
        model,
        (torch.randn(2, 2, *shape),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    path = tmp_path / "model.onnx"
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, 2, *shape)
        with torch.no_grad():
            wanted = model(x).numpy()
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))
