"""Updates in fewer bytes, with error feedback: what a round leaves out is added to the next one.

int8: one scale an array, 1 byte an entry. topk: the largest entries of the whole update, each an int8 and its place
(Seide et al., Interspeech 2014; Stich et al., NeurIPS 2018, arXiv:1809.07599).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from medray.errors import FederationError
from medray.learn.aggregation.mean import Weights

__all__ = ["compress", "decompress"]

How = Literal["none", "int8", "topk"]


def compress(update: Weights, residual: Weights, how: How, top: float) -> tuple[Weights, Weights]:
    """What is sent of an update, and what remains for the next round.

    Args:
        update: float arrays by name.
        residual: what the last round left out; empty at first.
        how: ``none`` sends all as it is.
        top: topk's share of the entries.

    Returns:
        arrays by ``NAME`` (int8: codes; topk: codes of the kept entries), ``NAME#scale`` and, for topk, ``NAME#at``;
        and the residual, alike in names to ``update``.
    """
    if how == "none":
        return dict(update), {}
    wanted = {name: value + residual[name] if name in residual else value for name, value in update.items()}
    least = 0.0
    if how == "topk":
        sizes = np.concatenate([np.abs(value).ravel() for value in wanted.values()])
        keep = max(1, round(top * sizes.size))
        least = float(np.partition(sizes, sizes.size - keep)[sizes.size - keep])
    sent: Weights = {}
    left: Weights = {}
    for name, value in wanted.items():
        flat = value.ravel()
        at = np.flatnonzero(np.abs(flat) >= least) if how == "topk" else None
        chosen = flat if at is None else flat[at]
        scale = np.float32(np.abs(chosen).max() / 127 if chosen.size else 0.0)
        codes = np.rint(chosen / scale).astype(np.int8) if scale > 0 else np.zeros(chosen.shape, np.int8)
        sent[name], sent[f"{name}#scale"] = codes, np.array([scale], np.float32)
        if at is not None:
            sent[f"{name}#at"] = at.astype(np.uint32)
        shown = np.zeros_like(flat)
        shown[slice(None) if at is None else at] = codes * scale
        left[name] = (flat - shown).reshape(value.shape)
    return sent, left


def decompress(sent: Mapping[str, npt.NDArray[Any]], expected: Weights, how: How) -> Weights:
    """The update that was sent, in the types and shapes of ``expected``. It comes from a stranger.

    Raises:
        FederationError: parts are missing, or of another type or size than ``expected`` allows.
    """
    if how == "none":
        return dict(sent)
    suffixes = ("", "#scale", "#at") if how == "topk" else ("", "#scale")
    wanted = {f"{name}{suffix}" for name in expected for suffix in suffixes}
    if sent.keys() != wanted:
        odd = sorted(sent.keys() ^ wanted)[0]
        raise FederationError(f"a {how} update must have exactly the parts of the model: {odd!r} is missing or unknown")
    update: Weights = {}
    for name, like in expected.items():
        codes, scale = sent[name], sent[f"{name}#scale"]
        at = sent.get(f"{name}#at")
        places = like.size if at is None else at.size
        if codes.dtype != np.int8 or codes.shape != (places,) or scale.shape != (1,) or scale.dtype != np.float32:
            raise FederationError(f"{name!r} of a {how} update has {codes.dtype} {codes.shape}, not int8 ({places},)")
        flat = np.zeros(like.size, like.dtype)
        if at is None:
            flat[:] = codes * scale[0]
        else:
            if at.dtype != np.uint32 or at.shape != (places,) or (places and int(at.max()) >= like.size):
                raise FederationError(f"{name!r} of a topk update names places beyond its {like.size} entries")
            flat[at] = codes * scale[0]
        update[name] = flat.reshape(like.shape)
    return update
