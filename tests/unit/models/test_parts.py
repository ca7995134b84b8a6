"""Where encoders end, and the order of their blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medray.errors import ModelError
from medray.models.catalogue import CATALOGUE
from medray.models.parts import MOST, encoder_blocks, encoder_parts
from tests.unit.models.test_networks import build_tiny

SOME = ("unet", "dynunet", "segresnet", "swin_unet", "unetr", "hrnet", "bisenet", "pspnet", "resnet18", "vit_s")


def built(name: str, **fields: object) -> nn.Module:
    with torch.device("meta"):
        return build_tiny(name, CATALOGUE[name].ndims[0], **fields)[0]


@pytest.mark.parametrize("name", [*SOME, "small_cnn", "densenet121", "deeplabv3_mobilenet", "encoder:resnet18"])
def test_blocks_are_the_encoder_from_the_image_on_and_leave_the_head(name: str) -> None:
    with torch.device("meta"):
        model, _, _ = build_tiny(name, 2)
    blocks = encoder_blocks(model)
    assert 3 <= len(blocks) <= MOST and all(blocks)
    flat = [id(p) for block in blocks for p in block]
    assert len(flat) == len(set(flat))
    stem = next(m for _, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 2)
    if name != "bisenet":  # whose first convolution is of the spatial path, beside the encoder
        assert id(stem.weight) in {id(p) for p in blocks[0]}
    last = [p for p in model.parameters() if p.shape[:1] == (3,) and p.ndim <= 1]  # the biases of three outputs
    assert last and not {id(p) for p in last} & set(flat)
    within = {id(p) for part in encoder_parts(model) for p in part.parameters()}
    assert within <= set(flat)


def test_embeddings_go_with_the_first_block_and_lone_norms_with_the_one_before() -> None:
    model = built("vit_s")
    blocks = encoder_blocks(model)
    assert len(blocks) == 13
    assert {id(model.pos_embed), id(model.cls_token)} <= {id(p) for p in blocks[0]}
    assert id(model.norm.weight) in {id(p) for p in blocks[-1]}


def test_wrappers_are_looked_through() -> None:
    plain, wrapped = built("unet"), built("unet", log_variance=True)
    assert [len(b) for b in encoder_blocks(plain)] == [len(b) for b in encoder_blocks(wrapped)]


def test_a_network_of_one_part_is_refused() -> None:
    with pytest.raises(ModelError, match="no encoder"):
        encoder_parts(nn.Linear(2, 2))
