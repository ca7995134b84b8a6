"""The torch runtime."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from medray.errors import ModelError
from medray.predict.predictor import Floats

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchPredictor:
    """A torch module in evaluation mode.

    Args:
        model: forward (B, C, *s) to logits (B, K[, *s]). It is moved to ``device`` and switched to evaluation here, and
            again before each call, so that a model in training can be validated between two epochs.
        device: where it runs; input and output are NumPy arrays on the CPU.
        precision: fp32, or the dtype of autocast.

    Raises:
        ModelError: an unknown precision, or CUDA asked for where there is none.
    """

    name = "torch"

    def __init__(self, model: nn.Module, *, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        if precision not in ("fp32", *_AUTOCAST):
            raise ModelError(f"precision {precision!r} is none of fp32, bf16, fp16. Choose one of these")
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ModelError(f"device {device!s} was asked for, but torch sees no CUDA device. Use device=cpu")
        self.precision: str = precision
        self.model = model.to(self.device).eval()

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) float32 to logits (B, K[, *s]) float32."""
        dtype = _AUTOCAST.get(self.precision)
        context = torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()
        if self.model.training:
            self.model.eval()
        with torch.inference_mode(), context:
            array = np.ascontiguousarray(batch, dtype=np.float32)
            if not array.flags.writeable:  # a read-only memory map: torch would warn at each call
                array = array.copy()
            logits = self.model(torch.from_numpy(array).to(self.device))
            return logits.float().cpu().numpy()
