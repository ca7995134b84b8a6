"""Which number format to compute in, and how tensors lie in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from medray.errors import ConfigError

__all__ = ["Precision", "autocast", "cpu_has_bf16", "lay_out", "memory_format", "resolve_device", "resolve_precision"]

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that ``experiment.device`` means here.

    Raises:
        ConfigError: CUDA asked for where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no CUDA device here; use device=auto or device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512-BF16 or AMX); elsewhere it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """The number format that ``train.precision`` means on ``device``.

    ``auto``: bf16 where the hardware has it, else fp16 on CUDA and fp32 on a CPU.

    Raises:
        ConfigError: fp16 on a CPU, whose kernels are slow and whose gradients underflow.
    """
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision=fp16 needs a CUDA device; on a CPU use auto, bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context of a forward pass in ``precision``."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def memory_format(ndim: int, device: torch.device, precision: Precision) -> torch.memory_format:
    """How images of ``ndim`` spatial axes, and the kernels that meet them, lie fastest.

    Channels last on a CPU (oneDNN: 1.2 times in fp32 and in bf16, 3-D U-Net of width 24) and for tensor cores.
    """
    if ndim not in (2, 3) or (device.type == "cuda" and precision == "fp32"):
        return torch.contiguous_format
    return torch.channels_last if ndim == 2 else torch.channels_last_3d


def lay_out(model: nn.Module, device: torch.device, precision: Precision) -> bool:
    """Put the model's kernels into the layout of :func:`memory_format`; whether its images should lie so too.

    Models with group normalisation stay as they are on a CPU: its backward pass is some 25 times slower with channels
    last.
    """
    if device.type == "cpu" and any(isinstance(module, nn.GroupNorm) for module in model.modules()):
        return False
    for ndim, kinds in ((2, (nn.Conv2d, nn.ConvTranspose2d)), (3, (nn.Conv3d, nn.ConvTranspose3d))):
        for module in model.modules():
            if isinstance(module, kinds):
                module.to(memory_format=memory_format(ndim, device, precision))
    return True
