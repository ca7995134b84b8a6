"""The Runtime of several processes that train one model together, over torch.distributed.

What one process would do with the whole batch, W do with parts of it, to the last digit that summing in another order
leaves alike: the loss of each is its part of the whole batch's, batch-norm's statistics are those of the whole batch
(where asked), and gradients are summed before they are clipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from medray.errors import TrainingError
from medray.learn.losses import Overlap
from medray.train.runtime import MakeOptimizer, Sums

T = TypeVar("T")


class GroupRuntime:
    """One of the processes of an initialised process group.

    Every trainable parameter has to take part in every step, as those of all networks of the catalogue do.

    Args:
        device: this process's.
        sync_batchnorm: normalise by the statistics of the whole batch rather than of this process's part of it.
    """

    is_alone = False

    def __init__(self, device: torch.device | str, *, sync_batchnorm: bool = True) -> None:
        self.device = torch.device(device)
        self.lane, self.size = dist.get_rank(), dist.get_world_size()
        self.is_main = self.lane == 0
        self._sync_batchnorm = sync_batchnorm

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, train_loader: Iterable[Any]
    ) -> tuple[nn.Module, torch.optim.Optimizer, Iterable[Any]]:
        model = model.to(self.device)
        if self._sync_batchnorm and self.size > 1:
            _synchronise(model)
        optimizer = make_optimizer(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # they are aligned before a validation, which is when they count
                gradient_as_bucket_view=True,
            )
        if self.size > 1:
            shard = getattr(train_loader, "shard", None)
            if shard is None:
                raise TrainingError(f"{type(train_loader).__name__} can't be shared among {self.size} processes")
            train_loader = cast("Iterable[Any]", shard(self.lane, self.size))
        return wrapped, optimizer, train_loader

    def criterion(self, loss: nn.Module) -> nn.Module:
        return _PartOfBatch(loss.to(self.device), self)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        return items[self.lane :: self.size]

    def reduce(self, metric_state: Mapping[str, npt.ArrayLike]) -> Sums:
        arrays = {key: np.asarray(value, dtype=np.float64) for key, value in metric_state.items()}
        if not arrays:
            return {}
        names = sorted(arrays)
        flat = torch.from_numpy(np.concatenate([arrays[name].reshape(-1) for name in names])).to(self.device)
        dist.all_reduce(flat)
        parts = np.split(flat.cpu().numpy(), np.cumsum([arrays[name].size for name in names])[:-1])
        return {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}

    def from_main(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def align(self, model: nn.Module) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer.data, src=0)

    def agree(self, flag: bool) -> bool:
        raised = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return cast("AbstractContextManager[None]", cast("DistributedDataParallel", model).no_sync())

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other along their first axis, whose lengths may differ."""
        lengths = self.reduce({"n": np.eye(self.size)[self.lane] * len(tensor)})["n"].astype(int).tolist()
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        every = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(every, padded)
        return torch.cat([part[:length] for part, length in zip(every, lengths, strict=True)])


class _PartOfBatch(nn.Module):
    """A loss as this process's part of the whole batch's, times the number of processes.

    The gradients of all parts sum to that of the whole; DistributedDataParallel takes their mean, hence the factor.
    """

    def __init__(self, loss: nn.Module, runtime: GroupRuntime) -> None:
        super().__init__()
        self.loss = loss
        self._runtime = runtime
        self._own: Tensor | None = None
        self._whole: Tensor | None = None
        for part in loss.modules():
            if isinstance(part, Overlap) and part.over_batch and runtime.size > 1:
                part.total, part.parts = _total, runtime.size

    @property
    def separable(self) -> bool:
        return bool(getattr(self.loss, "separable", False))

    def forward(self, logits: Any, target: Tensor, whole: Tensor | None = None) -> Tensor:
        own = target if whole is None else whole
        if own is not self._own:  # once a step, whatever the number of micro-batches
            self._own, self._whole = own, self._gather(own)
        value: Tensor = self.loss(logits, target, self._whole)
        return value * self._runtime.size

    def _gather(self, own: Tensor) -> Tensor:
        if self._runtime.size == 1:
            return own
        if own.is_floating_point() or own.ndim == 1:
            return self._runtime.gather(own)
        # A mask's classes and its ignored value are below 256: an eighth of the bytes.
        return self._runtime.gather(own.to(torch.uint8)).to(own.dtype)


class _Total(torch.autograd.Function):
    """The sum over all processes. What each derives of it is summed too, since each holds a part of the loss."""

    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient


def _total(tensor: Tensor) -> Tensor:
    return cast("Tensor", _Total.apply(tensor))


class GroupBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of all processes' samples, on any device that torch.distributed serves.

    PyTorch's own SyncBatchNorm runs on GPUs alone. Variance by a second pass over the differences: that of squares
    would lose digits where the mean is large.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        axes = (0, *range(2, x.ndim))
        shape = (1, -1, *[1] * (x.ndim - 2))
        count = torch.full((1,), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        sums = _total(torch.cat([x.sum(axes), count]))
        number = sums[-1].detach()
        mean = sums[:-1] / number
        centred = x - mean.view(shape)
        variance = _total(centred.square().sum(axes)) / number
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * number / (number - 1).clamp_min(1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)


def _synchronise(model: nn.Module) -> None:
    """Turn every batch normalisation of ``model`` into one over all processes, in place; names and values stay."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm) or isinstance(child, (nn.SyncBatchNorm, GroupBatchNorm)):
                continue
            kind = nn.SyncBatchNorm if next(model.parameters()).is_cuda else GroupBatchNorm
            twin = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            # The same tensors, as an optimiser or an average may hold them already.
            twin.__dict__.update(_parameters=child._parameters, _buffers=child._buffers, training=child.training)
            setattr(parent, name, twin)
