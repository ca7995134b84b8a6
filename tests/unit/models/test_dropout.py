"""Dropout of maps by kind, and stochastic depth in vendors' blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medray.errors import ModelError
from medray.models.dropout import MapDropout, add_drop_path
from medray.models.layers import DropPath
from tests.unit.models.test_networks import build_tiny


@pytest.mark.parametrize("ndim", [2, 3])
def test_each_kind_leaves_out_what_it_says_and_keeps_the_mean(ndim: int) -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 16, *(6,) * ndim)
    for kind, alike in (("standard", None), ("spatial", 1), ("channel", 2)):
        y = MapDropout(0.25, kind).train()(x)  # type: ignore[arg-type]
        assert y.unique().tolist() == pytest.approx([0, 4 / 3]) and y.mean().item() == pytest.approx(1, abs=0.06)
        dropped = y == 0
        places = (dropped.all(1) | ~dropped.any(1)).all().item()
        channels = (dropped.flatten(2).all(2) | ~dropped.flatten(2).any(2)).all().item()
        assert (places, channels) == (alike == 1, alike == 2)
        assert torch.equal(MapDropout(0.25, kind).eval()(x), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["unet", "segresnet", "hrnet", "bisenet", "encoder:resnet18"])
def test_a_kind_replaces_the_family_s_and_changes_no_name(name: str) -> None:
    with torch.device("meta"):
        plain, _, _ = build_tiny(name, 2, dropout=0.3)
        model, _, _ = build_tiny(name, 2, dropout=0.3, dropout_kind="spatial")
    kinds = [part.kind for part in model.modules() if isinstance(part, MapDropout)]
    assert kinds and set(kinds) == {"spatial"}
    assert not any(isinstance(part, nn.Dropout2d) for part in model.modules())
    assert set(model.state_dict()) == set(plain.state_dict())


def test_a_network_without_maps_to_drop_refuses_a_kind() -> None:
    with pytest.raises(ModelError, match="no field 'dropout_kind'"):
        build_tiny("vit_s", 2, dropout=0.3, dropout_kind="channel")


@pytest.mark.parametrize(("name", "ndim"), [("segresnet", 2), ("resnet18", 3), ("resnet50", 3), ("hrnet", 2)])
def test_stochastic_depth_in_vendors_blocks_is_the_vendor_s_network_at_rest(name: str, ndim: int) -> None:
    """Evaluated, or where every branch stays, it computes what the vendor's code does; where none does, less."""
    model, shape, _ = build_tiny(name, ndim)
    x = torch.randn(2, 2, *shape)
    names = set(model.state_dict())
    with torch.no_grad():
        wanted, trained = model.eval()(x), model.train()(x)
        model.load_state_dict(build_tiny(name, ndim)[0].state_dict())  # running statistics as they were
        add_drop_path(model, 0.4)
        rates = [part.p for part in model.modules() if isinstance(part, DropPath)]
        assert set(model.state_dict()) == names and rates[-1] == pytest.approx(0.4)
        torch.testing.assert_close(model.eval()(x), wanted)
        for part in model.modules():
            if isinstance(part, DropPath):
                part.p = 1e-9
        torch.testing.assert_close(model.train()(x), trained)
        for part in model.modules():
            if isinstance(part, DropPath):
                part.p = 1.0
        assert not torch.allclose(model(x), trained)
