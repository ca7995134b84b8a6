"""Gradient checkpointing: parts of a network run again in the backward pass, instead of keeping what they computed.

A network is cut where its modules call one another, so that any network can be: a segment is a module, and no segment
runs within another. Which ones is decided by one pass without gradients kept, that counts exactly what each module
keeps for the backward pass and estimates what running it again would cost (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

__all__ = ["How", "apply", "remove", "saved_bytes", "share_kept"]

How = Literal["off", "auto"] | int

KEPT: Mapping[str, float] = {
    "U-Net": 0.3,
    "Swin": 0.35,
    "ViT": 0.35,
    "DenseNet": 0.3,
    "ConvNeXt": 0.3,
    "BiSeNet": 0.3,
    "DeepLab": 0.35,
    "PSPNet": 0.35,
    "CNN": 0.5,
    "MobileNet": 0.5,
    "HRNet": 0.5,
}
"""By the catalogue's family: which share of the bytes ``auto`` leaves kept, where it isn't ``USUALLY``. The least of
.5, .45, .35 and .3 that lengthened a step by less than 30 % (bf16 on one Zen 4 core, CPU time of forward and backward;
MobileNet and HRNet pass it even so: many small kernels, each called once more)."""
USUALLY = 0.45
DEAREST = 0.75
"""Of a forward pass, what ``auto`` would run again at most: a step is about three of them."""
FINEST = 64
"""Segments of the finest cut that ``auto`` considers."""
FLOPS_PER_BYTE = 16.0
"""Floating-point operations in the time of a byte's way from or to memory, for the estimate of costs. It lies between
a CPU's some 10 and a GPU's some 100; which blocks are cheap hardly depends on it."""


def apply(
    model: nn.Module,
    how: How,
    batch: Tensor,
    *,
    kept: float = USUALLY,
    agree: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda names: names,
) -> tuple[str, ...]:
    """Have parts of ``model`` run again in the backward pass, in place.

    Gradients, random draws and running statistics are those of the plain network; names of parameters and buffers stay.
    In evaluation, and without gradients, nothing changes.

    Args:
        model: in the mode and on the device that it trains in; not compiled.
        how: "off" makes the network plain again; a number cuts all of it into so many segments (fewer where it has
            fewer blocks, some more where a block has several parts); "auto" runs as little again as brings the bytes
            that are kept down to ``kept``, as far as that costs at most ``DEAREST`` of a forward pass.
        batch: an input (B, C, *spatial) to measure with, under the autocast of training; B can be small. Its forward
            pass is run once, and keeps nothing for backward.
        kept: share of the plain network's bytes that "auto" leaves; see :func:`share_kept`.
        agree: the segments' names of the process that decides, where several train together.

    Returns:
        names of the modules that were made segments.
    """
    remove(model)
    if how == "off":
        return ()
    names = agree(_choose(_observe(model, batch), how, kept))
    for name in names:
        module = model.get_submodule(name)
        kind: Any = type(module)
        module.__class__ = _recomputed(kind)
    return names


def remove(model: nn.Module) -> None:
    """Make a network plain again."""
    for module in model.modules():
        plain = type(module).__dict__.get("_plain")
        if plain is not None:
            module.__class__ = plain


def share_kept(family: str) -> float:
    """What ``auto`` leaves of the bytes kept for backward, in a family of the catalogue."""
    return KEPT.get(family, USUALLY)


def saved_bytes(model: nn.Module, batch: Tensor) -> int:
    """Bytes that a training pass of ``model`` over ``batch`` keeps for the backward pass.

    Exact and the same on all devices: what autograd saves, each storage once; parameters, buffers and the input, which
    are there anyway, don't count. Nothing of the model changes, and no draw is lost.
    """
    with _trial(model, batch):
        tally = _Tally(model, batch)
        with torch.autograd.graph.saved_tensors_hooks(tally.key, _never):
            model(batch)
    return sum(tally.sizes.values())


# -- the second pass
# ------------------------------------------------------------------------------------------------------------------


@cache
def _recomputed(plain: Any) -> type[nn.Module]:
    """The class of modules of class ``plain`` that run again. Their state is untouched, which a wrapper's isn't."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return plain.forward(self, *args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run(*tensors: Tensor) -> Any:
            filled = list(rest)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            inner, named = tree_unflatten(filled, form)
            return plain.forward(self, *inner, **named)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _still(self)

        # Handed over one by one, since checkpoint() looks for tensors in no list.
        tensors = [leaves[place] for place in places]
        return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)

    made = {"forward": forward, "_plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return cast("type[nn.Module]", type(plain.__name__, (plain,), made))


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Within it, running statistics move in copies: a second pass must not count its samples again."""
    held: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
    for part in module.modules():
        if part._buffers and getattr(part, "track_running_stats", False):
            held.append((part._buffers, dict(part._buffers)))
            part._buffers.update({k: None if b is None else b.clone() for k, b in part._buffers.items()})
    try:
        yield
    finally:
        for buffers, originals in held:
            buffers.update(originals)


@contextmanager
def _trial(model: nn.Module, batch: Tensor) -> Iterator[None]:
    """A training pass that leaves no trace: mode, generators and running statistics are as they were."""
    modes = [(part, part.training) for part in model.modules()]
    if not model.training:
        model.train()
    devices = [batch.device] if batch.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), _still(model), torch.enable_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


# -- what a network keeps
# -------------------------------------------------------------------------------------------------------------


def _never(_: object) -> Tensor:
    raise RuntimeError("a pass that only counts has no backward pass")


class _Tally:
    """Storages by identity. Their weak references keep an address from being given to another one."""

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        self.sizes: dict[int, int] = {}
        self._references: dict[int, StorageWeakRef] = {}
        self._there: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers(), batch):
            self._there.add(self.key(tensor))
        self.sizes = {}

    def key(self, tensor: Tensor) -> int:
        """Note the tensor's storage."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        key = int(reference.cdata)
        self._references.setdefault(key, reference)
        if key not in self._there:
            self.sizes.setdefault(key, storage.nbytes())
        return key


@dataclass
class _Observation:
    """One pass: who called whom, what each call path kept and cost. Modules are numbers; the network itself is 0.

    Attributes:
        names: of the modules, by number.
        below: modules that a module called first, in order.
        inputs: storages of the tensors that a module was handed.
        kept: storages kept for backward, by path of calls.
        cost: of running again, in bytes moved, by path of calls.
        sizes: bytes of storages, those of parameters, buffers and the input aside.
        unfit: modules that can't be segments.
    """

    names: list[str]
    below: dict[int, list[int]] = field(default_factory=dict)
    inputs: dict[int, set[int]] = field(default_factory=dict)
    kept: dict[tuple[int, ...], set[int]] = field(default_factory=dict)
    cost: dict[tuple[int, ...], float] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    unfit: set[int] = field(default_factory=set)

    def bytes(self, storages: set[int]) -> int:
        return sum(self.sizes.get(key, 0) for key in storages)

    @cached_property
    def _within(self) -> dict[int, int]:
        every: dict[int, set[int]] = {}
        for path, keys in self.kept.items():
            for module in path:
                every.setdefault(module, set()).update(keys)
        return {module: self.bytes(keys) for module, keys in every.items()}

    @cached_property
    def _costs(self) -> dict[int, float]:
        every: dict[int, float] = {}
        for path, cost in self.cost.items():
            for module in set(path):
                every[module] = every.get(module, 0.0) + cost
        return every

    def within(self, module: int) -> int:
        """Bytes that a module keeps, with those that it calls."""
        return self._within.get(module, 0)

    def cost_of(self, module: int) -> float:
        """Of running a module again."""
        return self._costs.get(module, 0.0)

    def left(self, segments: set[int]) -> int:
        """Bytes kept for backward, once ``segments`` keep their inputs alone."""
        storages: set[int] = set()
        for path, keys in self.kept.items():
            if segments.isdisjoint(path):
                storages |= keys
        for segment in segments:
            storages |= self.inputs[segment]
        return self.bytes(storages)

    def parts(self, module: int) -> list[int]:
        """The nearest modules that it called and that can be segments."""
        found: list[int] = []
        for child in self.below.get(module, []):
            fit = child not in self.unfit and child in self.below and self.within(child)
            found += [child] if fit else self.parts(child)
        return found

    def cut(self, number: int) -> list[int]:
        """At least ``number`` modules, none called within another: the one that keeps most is split, again and again.

        Fewer where there are no more.
        """
        whole = [] if 0 in self.unfit else [0]
        pieces = whole if number == 1 and whole else self.parts(0)
        final: list[int] = []
        while pieces and len(pieces) + len(final) < number:
            largest = max(pieces, key=lambda piece: (self.within(piece), -piece))
            pieces.remove(largest)
            parts = self.parts(largest)
            if parts:
                pieces += parts
            else:
                final.append(largest)
        return sorted(pieces + final)


def _observe(model: nn.Module, batch: Tensor) -> _Observation:
    """Run ``model`` once in training mode, and keep nothing for backward."""
    numbers = {module: number for number, (_, module) in enumerate(model.named_modules())}
    seen = _Observation(names=[name for name, _ in model.named_modules()])
    calls: list[tuple[int, list[tuple[Tensor, int]]]] = []
    known: set[int] = {0}

    def path() -> tuple[int, ...]:
        return tuple(number for number, _ in calls)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        number = numbers[module]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if calls and number not in known:
            seen.below.setdefault(calls[-1][0], []).append(number)
        known.add(number)
        seen.inputs.setdefault(number, set()).update(map(tally.key, tensors))
        calls.append((number, [(tensor, tensor._version) for tensor in tensors]))

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        number, tensors = calls.pop()
        if any(tensor._version != version for tensor, version in tensors) or isinstance(module, torch.jit.ScriptModule):
            seen.unfit.add(number)  # run again, it would find its input changed by itself

    def pack(tensor: Tensor) -> int:
        key = tally.key(tensor)
        seen.kept.setdefault(path(), set()).add(key)
        return key

    class Costs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                moved = sum(leaf.nbytes for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))
                formula = flop_registry.get(func.overloadpacket)
                flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
                at = path()
                seen.cost[at] = seen.cost.get(at, 0.0) + max(float(moved), flops / FLOPS_PER_BYTE)
            return out

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(_trial(model, batch))
        tally = _Tally(model, batch)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _never))
        stack.enter_context(Costs())
        model(batch)
    seen.sizes = tally.sizes
    return seen


# -- which parts run again
# ------------------------------------------------------------------------------------------------------------


def _choose(seen: _Observation, how: How, kept: float) -> tuple[str, ...]:
    chosen = _least(seen, kept) if how == "auto" else _all(seen, int(how))
    return tuple(seen.names[segment] for segment in sorted(chosen))


def _all(seen: _Observation, number: int) -> set[int]:
    """Of a cut into ``number`` segments all that bring something."""
    chosen = set(seen.cut(number))
    for segment in sorted(chosen, key=seen.within):
        if seen.left(chosen - {segment}) <= seen.left(chosen):
            chosen.remove(segment)
    return chosen


def _least(seen: _Observation, kept: float) -> set[int]:
    """Of all cuts the segments that reach the goal within the cost, with the lowest peak in the backward pass."""
    plain, whole = seen.left(set()), sum(seen.cost.values())
    best: tuple[tuple[float, float, float], set[int]] = ((plain, 0.0, 0.0), set())
    number = 2
    while number <= FINEST:
        pieces = seen.cut(number)
        chosen = _cheapest(seen, pieces, kept * plain)
        left = seen.left(chosen)
        cost = sum(seen.cost_of(segment) for segment in chosen)
        peak = left + max(map(seen.within, chosen), default=0)
        rank = (max(0.0, left - kept * plain), max(0.0, cost - DEAREST * whole), float(peak))
        best = min(best, (rank, chosen), key=lambda pair: pair[0])
        if len(pieces) < number:
            break
        number = max(number + number // 2, len(pieces) + 1)
    return best[1]


def _cheapest(seen: _Observation, pieces: list[int], goal: float) -> set[int]:
    """The pieces that shed most for what they cost, until ``goal`` bytes are left; then those that proved needless
    out again."""
    worth = {piece: seen.within(piece) / (seen.cost_of(piece) + 1.0) for piece in pieces}
    chosen: list[int] = []
    for piece in sorted(pieces, key=lambda piece: (-worth[piece], piece)):
        if seen.left(set(chosen)) <= goal:
            break
        chosen.append(piece)
    for piece in reversed(chosen.copy()):
        if seen.left(set(chosen) - {piece}) <= max(goal, seen.left(set(chosen))):
            chosen.remove(piece)
    return set(chosen)
