"""Pretrained weights from a local file, and the hub out of reach."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from medray.config.schema import ModelConfig
from medray.errors import ModelError
from medray.models.catalogue import build_model
from medray.models.weights import adapt_inputs, hub_weights, load_weights


def small(*, channels: int = 1, outputs: int = 3, pretrained: str | None = None, width: int = 8) -> torch.nn.Module:
    return build_model(
        ModelConfig(name="small_cnn", feature_size=width, pretrained=pretrained),
        kind="classification",
        ndim=2,
        in_channels=channels,
        num_outputs=outputs,
        patch_size=None,
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(small(channels=3).state_dict(), path)
    return path


def test_the_same_network_takes_everything(weights: Path) -> None:
    first, second = small(channels=3, pretrained=str(weights)), small(channels=3, pretrained=str(weights))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    report = load_weights(first, weights)
    assert not report.skipped + report.missing + report.unused + report.adapted
    assert len(report.loaded) == len(first.state_dict())


def test_prefixes_of_wrappers_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({f"module.{k}": v for k, v in small().state_dict().items()}, path)
    assert not load_weights(small(), path).missing


def test_a_head_for_other_classes_is_skipped_and_said(weights: Path) -> None:
    model = small(channels=3, outputs=5)
    before = model.head.linear.weight.clone()
    report = load_weights(model, weights)
    assert {name for name, _ in report.skipped} == {"head.linear.weight", "head.linear.bias"}
    assert "file shape (3, 128), network shape (5, 128)" in str(report)
    assert torch.equal(model.head.linear.weight, before)


def test_the_first_convolution_is_fitted_to_the_channels(weights: Path) -> None:
    model = small(channels=1)
    report = load_weights(model, weights)
    assert report.adapted == ("features.0.0.weight",)
    source = small(channels=3, pretrained=str(weights)).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model.eval()(x), source(x.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_adapted_channels_answer_a_grey_image_alike(channels: int) -> None:
    weight = torch.ones(4, 3, 3, 3)
    adapted = adapt_inputs(weight, channels)
    assert adapted.shape == (4, channels, 3, 3)
    torch.testing.assert_close(adapted.sum(1), weight.sum(1))


def test_another_network_s_file_is_refused(weights: Path) -> None:
    with pytest.raises(ModelError, match="it is of another network"):
        small(channels=3, width=16, pretrained=str(weights))


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 64, (2**60).to_bytes(8, "little") + b"{}"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"no readable \.safetensors file"):
        small(pretrained=str(path))


def test_a_missing_file_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        small(pretrained=str(tmp_path / "none.safetensors"))
    with pytest.raises(ModelError, match="neither 'hub' nor a local"):
        small(pretrained="weights.pth")
    with pytest.raises(ModelError, match="the hub has no 2-D weights for 'small_cnn'"):
        small(pretrained="hub")


def test_the_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(
        ModelError, match=r"'resnet18' could not be fetched from the hub .* give the \.safetensors file"
    ):
        build_model(
            ModelConfig(name="resnet18", pretrained="hub"),
            kind="classification",
            ndim=2,
            in_channels=1,
            num_outputs=2,
            patch_size=None,
        )
    assert before == constants.HF_HUB_OFFLINE


def test_our_own_errors_pass_through_the_hub_s_guard() -> None:
    with pytest.raises(ModelError, match=r"^mine$"), hub_weights("x"):
        raise ModelError("mine")
