"""Which precision is chosen where."""

from __future__ import annotations

import pytest
import torch

from medray.errors import ConfigError
from medray.train import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")]
)
def test_auto_on_a_cpu_follows_its_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: object, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.resolve_precision("auto", CPU) == expected
    assert precision.resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_cuda_follows_the_card(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert precision.resolve_precision("auto", CUDA) == expected


def test_what_a_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        precision.resolve_precision("fp16", CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=auto or device=cpu"):
        precision.resolve_device("cuda")
    assert precision.resolve_device("auto") == CPU


def test_autocast_computes_low_and_leaves_fp32_alone() -> None:
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    with precision.autocast("bf16", CPU):
        assert layer(x).dtype == torch.bfloat16
    with precision.autocast("fp32", CPU):
        assert layer(x).dtype == torch.float32


def test_layout_follows_the_device_and_spares_group_normalisation() -> None:
    conv = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.Conv2d(2, 4, 3))
    assert precision.lay_out(conv, CPU, "bf16")
    assert conv[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert conv[1].weight.is_contiguous(memory_format=torch.channels_last)
    normed = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.GroupNorm(2, 4))
    assert not precision.lay_out(normed, CPU, "bf16") and normed[0].weight.is_contiguous()
    assert precision.memory_format(3, CUDA, "fp32") == torch.contiguous_format
    assert precision.memory_format(3, CUDA, "bf16") == torch.channels_last_3d
