"""Networks with a log-variance beside each logit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medray.learn.optimizers import parameter_groups
from medray.models.variance import LogVariance
from tests.unit.models.test_networks import build_tiny


@pytest.mark.parametrize(("name", "fields"), [("small_cnn", {}), ("unet", {"deep_supervision": True})])
def test_trains_with_variances_and_answers_with_logits(name: str, fields: dict[str, object]) -> None:
    model, shape, segments = build_tiny(name, 2, log_variance=True, **fields)
    space = shape if segments else ()
    assert isinstance(model, LogVariance)
    x = torch.randn(2, 2, *shape)
    outputs = model.train()(x)
    levels = outputs if isinstance(outputs, list) else [outputs]
    assert all(level.shape[:2] == (2, 6) for level in levels) and levels[0].shape == (2, 6, *space)
    with torch.no_grad():
        inner = model.eval().model(x)
        assert torch.equal(model(x), inner[:, :3])


def test_weights_are_exchanged_with_the_plain_network(tmp_path: Path) -> None:
    wide, _, _ = build_tiny("small_cnn", 2, log_variance=True)
    save_file(wide.state_dict(), str(tmp_path / "w.safetensors"))
    plain, _, _ = build_tiny("small_cnn", 2, pretrained=str(tmp_path / "w.safetensors"))
    own = dict(wide.named_parameters())
    for name, parameter in plain.named_parameters():
        if "linear" not in name:  # the head, which has other outputs
            assert torch.equal(parameter, own[f"model.{name}"])


def test_what_the_network_spares_from_decay_stays_spared() -> None:
    with torch.device("meta"):
        model, _, _ = build_tiny("vit_s", 2, log_variance=True)
    free = {id(p) for group in parameter_groups(model, 0.1) if not group["weight_decay"] for p in group["params"]}
    assert id(model.model.pos_embed) in free
