"""Pretrained weights: a local .safetensors file, or the hub."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from medray.errors import ModelError

_LOG = logging.getLogger(__name__)
_PREFIXES = ("module.", "model.", "_orig_mod.")
_ENOUGH = 0.5
"""A file that matches less than this share of the network's parameters is taken for the wrong file."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a file gave.

    Attributes:
        loaded: names of tensors taken as they are.
        adapted: first convolutions fitted to another number of input channels.
        skipped: name and reason (``file shape ..., network shape ...``): heads for other classes, stems of another
        size. missing: of the network, not in the file.
        unused: in the file, not in the network.
    """

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.adapted:
            parts.append(f"input channels adapted: {', '.join(self.adapted)}")
        if self.skipped:
            parts.append("left at random: " + "; ".join(f"{name} ({why})" for name, why in self.skipped))
        if self.missing:
            parts.append(f"not in the file: {_some(self.missing)}")
        if self.unused:
            parts.append(f"not in the network: {_some(self.unused)}")
        return ". ".join(parts)


def load_weights(model: nn.Module, path: Path) -> LoadReport:
    """Load a ``.safetensors`` file into ``model``, as far as names and shapes agree.

    A first convolution for another number of channels is adapted: to one channel by the sum over channels, to more by
    repeating them, scaled so that the response stays alike (as timm does). A tensor of another shape is left at random
    and reported.

    Raises:
        ModelError: the file is missing or damaged, or is of another network (less than half of the parameters match).
    """
    state = {_plain(name): tensor for name, tensor in _read(path).items()}
    own = model.state_dict()
    stem = _stem(model)
    loaded: list[str] = []
    adapted: list[str] = []
    skipped: list[tuple[str, str]] = []
    with torch.no_grad():
        for name, target in own.items():
            source = state.get(name)
            if source is None:
                continue
            if source.shape == target.shape:
                target.copy_(source)
                loaded.append(name)
            elif name == stem and _only_inputs_differ(source, target):
                target.copy_(adapt_inputs(source.float(), target.shape[1]))
                adapted.append(name)
            else:
                skipped.append((name, f"file shape {tuple(source.shape)}, network shape {tuple(target.shape)}"))
    total = sum(part.numel() for part in own.values())
    matched = sum(own[name].numel() for name in (*loaded, *adapted))
    if matched < _ENOUGH * total:
        detail = "; ".join(f"{n} ({why})" for n, why in skipped[:3])
        raise ModelError(
            f"{path}: its tensors match {matched / total:.0%} of this network's parameters"
            f"{f' ({detail})' if detail else ''}: it is of another network. Give a file of the same model.name, "
            f"model.feature_size and model.depth, or leave model.pretrained out"
        )
    report = LoadReport(
        loaded=tuple(loaded),
        adapted=tuple(adapted),
        skipped=tuple(skipped),
        missing=tuple(name for name in own if name not in state),
        unused=tuple(name for name in state if name not in own),
    )
    _LOG.log(logging.WARNING if skipped or report.missing else logging.INFO, "%s: %s", path, report)
    return report


def adapt_inputs(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight (O, I, *kernel) for another number of input channels."""
    inputs = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeats = -(-channels // inputs)
    return weight.repeat(1, repeats, *(1,) * (weight.dim() - 2))[:, :channels] * (inputs / channels)


@contextmanager
def hub_weights(name: str) -> Iterator[None]:
    """Fetch within seconds or not at all, and turn whatever a hub's client raises into one clear error.

    Where the hub can't be reached, its client would try again for a minute; it is told to look into its cache only.

    Raises:
        ModelError: the weights could not be fetched.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _reachable(constants.ENDPOINT)
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # urllib, requests, huggingface_hub and timm each raise their own
        raise ModelError(
            f"the pretrained weights of '{name}' could not be fetched from the hub ({type(error).__name__}). "
            f"Where this machine is offline, fetch them elsewhere and give the .safetensors file in "
            f"model.pretrained; or leave it out for random weights"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch_torchvision(url: str) -> dict[str, Tensor]:
    """A state dict of torchvision's store, its hash checked (torchvision's own way would unpickle what is in it)."""
    return torch.hub.load_state_dict_from_url(
        url, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )


def _reachable(endpoint: str, seconds: float = 4.0) -> bool:
    """Whether the hub's host answers; taken for granted behind a proxy, where only the client knows the way."""
    url = urlsplit(endpoint)
    names = (f"{url.scheme}_proxy", "all_proxy")
    proxied = any(os.environ.get(name) or os.environ.get(name.upper()) for name in names)
    if url.hostname is None or proxied:
        return True
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), seconds):
            return True
    except OSError:
        return False


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"model.pretrained: there is no file {path}. Give an existing .safetensors file, or 'hub'")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no readable .safetensors file ({error}). Fetch or write it anew") from None


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _stem(model: nn.Module) -> str | None:
    """Name of the weight of the first convolution."""
    for name, part in model.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d)):
            return f"{name}.weight"
    return None


def _only_inputs_differ(source: Tensor, target: Tensor) -> bool:
    return source.dim() == target.dim() and source.shape[0] == target.shape[0] and source.shape[2:] == target.shape[2:]


def _some(items: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
