"""Which weights of a network travel, and how they become arrays and back."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.config.federation import FederationConfig
from medray.errors import FederationError
from medray.learn.aggregation.mean import Weights

__all__ = ["arrays_of", "keeps_own", "own_names", "put", "shared_names", "statistics_of"]

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def shared_names(model: nn.Module, config: FederationConfig) -> tuple[str, ...]:
    """Names of the floating-point weights and statistics that the server averages, in the network's order.

    Under fedbn all of a norm layer stays at the site (Li et al., ICLR 2021, arXiv:2102.07623); so does what
    ``federation.local`` names. Counters (batch norm's number of batches) are nobody's business.

    Raises:
        FederationError: a pattern of ``federation.local`` fits nothing, fedbn finds no norm layer, or nothing is left
            to share.
    """
    state = model.state_dict()
    kept: set[str] = set()
    if config.strategy == "fedbn":
        for prefix, module in model.named_modules():
            if isinstance(module, _NORMS):
                kept |= {name for name in state if name.startswith(f"{prefix}." if prefix else "")}
        if not kept:
            raise FederationError(
                "federation.strategy=fedbn keeps norm layers at the sites, and this network has none with weights: "
                "nothing would stay there. Choose fedavg, or another model.name or model.norm"
            )
    for pattern in config.local:
        fitting = {name for name in state if fnmatchcase(name, pattern)}
        if not fitting:
            tops = ", ".join(dict.fromkeys(name.split(".")[0] + ".*" for name in state))
            raise FederationError(f"federation.local: {pattern!r} fits no weight of the network. It has: {tops}")
        kept |= fitting
    names = tuple(name for name, value in state.items() if name not in kept and value.is_floating_point())
    if not names:
        raise FederationError("federation.local keeps every weight at the sites: nothing is left to share")
    return names


def keeps_own(config: FederationConfig) -> bool:
    """Whether some weights stay at the sites."""
    return config.strategy == "fedbn" or bool(config.local)


def own_names(model: nn.Module, shared: Collection[str]) -> tuple[str, ...]:
    """Names of the weights and statistics that stay at the sites, in the network's order; counters are none."""
    return tuple(name for name, value in model.state_dict().items() if name not in shared and value.is_floating_point())


def statistics_of(model: nn.Module) -> frozenset[str]:
    """Names of what no gradient moves: running means and variances."""
    return frozenset(model.state_dict()) - {name for name, _ in model.named_parameters()}


def arrays_of(model: nn.Module, names: tuple[str, ...]) -> Weights:
    """Copies of some weights, float32."""
    state = model.state_dict()
    return {name: state[name].detach().to("cpu", torch.float32).numpy().copy() for name in names}


def put(model: nn.Module, weights: dict[str, npt.NDArray[Any]]) -> None:
    """Set some weights of a network, in place.

    Raises:
        FederationError: a name or shape that the network doesn't have.
    """
    state = model.state_dict()
    for name, value in weights.items():
        if name not in state or tuple(state[name].shape) != value.shape:
            has = tuple(state[name].shape) if name in state else "none"
            raise FederationError(
                f"weight {name!r} of shape {value.shape} doesn't fit this site's network ({has}). Do the server and "
                "the site run the same version?"
            )
        state[name].copy_(torch.from_numpy(np.array(value)))
