"""How many samples fit into memory at once: ``train.micro_batch: auto``."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medray.models.checkpointing import saved_bytes
from medray.train import memory
from medray.train.precision import Precision, autocast
from medray.train.runtime import Runtime
from medray.train.seeding import preserved_rng

__all__ = ["largest_micro_batch"]

MARGIN = {"cuda": 0.9, "cpu": 0.7}
"""Share of the memory at hand that is filled. On a CPU other processes take some of it as the run goes on."""
BACKWARD = 1.25
"""What a backward pass needs, over what was kept for it: gradients of activations, a kernel's scratch."""
STATES = 4
"""Tensors beside each parameter, at most: its gradient, the optimiser's two moments, where it was before a look
uphill."""
HOSTS = 256


def largest_micro_batch(model: nn.Module, images: Tensor, count: int, *, precision: Precision, runtime: Runtime) -> int:
    """The largest of the even parts of a batch that fits into memory, the same in all processes.

    One and two samples are measured forwards and backwards, and what more would need follows from their difference. On
    a CUDA device the answer is tried, and halved until it goes through. Nothing of the model changes, and no draw is
    lost.

    Args:
        model: as it trains (in training mode, checkpointed where it is to be), not wrapped.
        images: one or two samples (B, C, *spatial) on the model's device.
        count: samples of a batch that a process has, at most.
        precision: of the forward pass.
        runtime: for the device, and to agree.
    """
    if count == 1:
        return 1
    device = runtime.device
    with preserved_rng(), _own_statistics(model):
        # Together: a process that found this out by itself would leave the others waiting.
        if device.type == "cuda" and runtime.agree(_overflows(model, images, 2, precision, device)):
            return 1
    with preserved_rng():
        kept = _kept(model, images, precision)
    with preserved_rng(), _own_statistics(model):
        one = _spent(model, images, 1, precision, device)
        each = max(_spent(model, images, 2, precision, device) - one, int(BACKWARD * kept))
        fixed = max(0, one - each) + STATES * sum(p.numel() * p.element_size() for p in model.parameters())
        room = MARGIN[device.type] * memory.available(device) / _neighbours(runtime) - fixed
        fits = max(1, min(count, int(room // max(1, each))))
        passes = _most(-(-count // fits), runtime)
        while device.type == "cuda" and passes < count:
            if not runtime.agree(_overflows(model, images, -(-count // passes), precision, device)):
                break
            passes = min(count, 2 * passes)
    return -(-count // passes)


def _pass(model: nn.Module, images: Tensor, number: int, precision: Precision, device: torch.device) -> None:
    """Forwards and backwards over so many samples, in place of a loss an entropy, which keeps as many maps."""
    batch = images[torch.arange(number, device=images.device) % len(images)]
    with autocast(precision, device):
        output = model(batch)
    levels = [output] if isinstance(output, Tensor) else list(output)
    entropy = torch.stack([(x.float().softmax(1) * x.float().log_softmax(1)).sum() for x in levels]).sum()
    # Not backward(): the gradients' places, and whoever waits for them to be filled, are left alone.
    torch.autograd.grad(entropy, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _spent(model: nn.Module, images: Tensor, number: int, precision: Precision, device: torch.device) -> int:
    """Bytes that a pass over so many samples takes at its peak."""
    memory.reset_peak(device)
    before = memory.in_use(device)
    _pass(model, images, number, precision, device)
    return max(0, int(memory.peak_mb(device) * 2**20) - before)


def _kept(model: nn.Module, images: Tensor, precision: Precision) -> int:
    """Bytes that a sample keeps for its backward pass: exact, where the peak of a small one drowns in the noise."""
    with autocast(precision, images.device):
        return saved_bytes(model, images) // len(images)


def _overflows(model: nn.Module, images: Tensor, number: int, precision: Precision, device: torch.device) -> bool:
    try:
        _pass(model, images, number, precision, device)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
    else:
        return False
    torch.cuda.empty_cache()  # outside of `except`: the traceback keeps the failed pass's activations alive
    return True


def _most(value: int, runtime: Runtime) -> int:
    """The largest ``value`` (below 2^14) of any process, bit by bit."""
    found = 0
    for bit in reversed(range(14)):
        if runtime.agree(value >= found + 2**bit):
            found += 2**bit
    return found


def _neighbours(runtime: Runtime) -> float:
    """Processes of this training that share this machine's memory; a GPU is one process's own."""
    if runtime.is_alone or runtime.device.type == "cuda":
        return 1.0
    mine = zlib.crc32(platform.node().encode()) % HOSTS  # two names of one number make the answer too careful
    return float(runtime.reduce({"hosts": np.eye(HOSTS)[mine]})["hosts"][mine])


@contextmanager
def _own_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, batch-norm uses its running statistics: one process out of memory must not leave others waiting for
    its part of a batch's."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True
