"""torch to ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from medray.errors import BundleError

MAX_EMBEDDED_BYTES = (2 << 30) - (64 << 20)
"""Protocol buffers end at 2 GiB; a little is left for the graph."""


def to_onnx(model: nn.Module, path: Path, *, example: Tensor, dynamic_spatial: bool = False) -> None:
    """Write ``model`` as one ONNX file with a dynamic batch.

    Args:
        model: forward (B, C, *s) to (B, K[, *s]); is switched to evaluation.
        path: of the ``.onnx`` file; weights are inside.
        example: (B, C, *s), any B; its spatial shape is the exported one.
        dynamic_spatial: the spatial axes are dynamic too, for networks that see whole images of any size.

    Raises:
        BundleError: the exporter refuses the network, or the weights exceed one file.
    """
    weight = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if weight > MAX_EMBEDDED_BYTES:
        raise BundleError(f"the weights take {weight} bytes; one ONNX file holds 2 GiB. Choose a smaller model")
    model = model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # Two samples: the exporter would specialise a batch of one.
    batch = example[:1].to(device).expand(2, *example.shape[1:]).contiguous()
    shape: dict[int, object] = {0: torch.export.Dim("batch", min=1, max=4096)}
    if dynamic_spatial:
        shape |= dict.fromkeys(range(2, example.ndim), torch.export.Dim.AUTO)
    try:
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            program = torch.onnx.export(
                model,
                (batch,),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=(shape,),
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BundleError(
            f"{type(model).__name__} can't be exported to ONNX: {reason}. Write the bundle without ONNX "
            "(onnx=False); the torch runtime still works"
        ) from error


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """The exporter prints progress and logs its own internals."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
