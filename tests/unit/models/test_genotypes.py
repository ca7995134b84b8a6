"""Operations, cells and the networks of genotypes, in 2-D and 3-D."""

from __future__ import annotations

import pytest
import torch

from medray.compress.prune import prune
from medray.config.genotype import CELLS, OPERATIONS, Genotype
from medray.config.schema import ModelConfig
from medray.errors import ModelError
from medray.models import checkpointing
from medray.models.catalogue import build_model, lookup
from medray.models.operations import norm_of, operation
from medray.models.parts import encoder_blocks

ROTATED = [
    [[0, "sep3"], [1, "skip"]],
    [[0, "conv3"], [2, "max3"]],
    [[1, "avg3"], [3, "dil3"]],
    [[2, "sep5"], [4, "skip"]],
]
NAMES = {
    kind: Genotype.model_validate({"kind": kind, "cells": dict.fromkeys(cells, ROTATED)}).name
    for kind, cells in CELLS.items()
}


def build(kind, ndim, side, **fields):
    fields = {"feature_size": 4, "depth": 3} | fields
    torch.manual_seed(0)
    return build_model(
        ModelConfig(name=NAMES[kind], **fields),
        kind=kind, ndim=ndim, in_channels=2, num_outputs=3, patch_size=None if side is None else (side,) * ndim,
    )  # fmt: skip


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_or_halves_any_size(name, kind, ndim):
    for stride in (1, 2):
        op = operation(name, ndim, 4, stride, norm_of(kind, ndim))
        for side in (6, 7):
            x = torch.randn(2, 4, *(side,) * ndim)
            before = x.clone()
            assert op(x).shape == (2, 4, *((side + stride - 1) // stride,) * ndim)
            assert torch.equal(x, before)  # several operations read the same map


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("kind", CELLS)
def test_the_network_trains_in_both_dimensions(kind, ndim):
    side = 16 if kind == "segmentation" else 17  # a classifier's need not be even
    model = build(kind, ndim, side)
    logits = model.train()(torch.randn(2, 2, *(side,) * ndim))
    assert logits.shape == ((2, 3, *(side,) * ndim) if kind == "segmentation" else (2, 3))
    logits.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_a_large_image_is_brought_down_by_the_stem():
    small, large = build("classification", 2, 64), build("classification", 2, 256)
    seen = []
    for model, side in ((small, 64), (large, 256)):
        model.cells[0].register_forward_hook(lambda _m, args, _y: seen.append(args[0].shape[2]))
        model.eval()(torch.randn(1, 2, side, side))
    assert seen == [64, 64]


def test_it_is_an_entry_of_the_catalogue_like_any_other():
    spec = lookup(NAMES["segmentation"])
    assert spec.divisor(ModelConfig(name=spec.name, depth=4), 2) == 8
    with pytest.raises(ModelError, match="does segmentation, not classification"):
        spec.check(ModelConfig(name=spec.name), kind="classification", ndim=2, patch_size=None)
    with pytest.raises(ModelError, match="has no field 'deep_supervision'"):
        spec = lookup(NAMES["classification"])
        spec.check(ModelConfig(name=spec.name, deep_supervision=True), kind="multilabel", ndim=2, patch_size=None)
    with pytest.raises(ModelError, match="holds no genotype"):
        lookup("genotype:../../etc/passwd")


def test_deep_supervision_and_drop_path_act_in_training_only():
    model = build("segmentation", 2, 32, depth=4, deep_supervision=True, drop_path=0.5)
    x = torch.randn(2, 2, 32, 32)
    assert [y.shape[2] for y in model.train()(x)] == [32, 16]
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.parametrize("kind", CELLS)
def test_it_is_cut_into_blocks_and_pruned_as_any_other(kind):
    model = build(kind, 2, 32, feature_size=16)
    assert len(encoder_blocks(model)) >= 3
    x = torch.randn(2, 2, 32, 32)
    plain = model.train()(x)
    model.zero_grad()
    plain.square().mean().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    assert len(checkpointing.apply(model, 3, x)) >= 3
    model.zero_grad()
    model(x).square().mean().backward()
    for got, gradient in zip((p.grad for p in model.parameters()), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    checkpointing.remove(model)
    smaller = prune(model, 0.5, x[:1], outputs=3)
    assert smaller.parameters[1] < 0.7 * smaller.parameters[0]
