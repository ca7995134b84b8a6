"""Time one engine of a bundle in this process and tell, as one line of JSON: ``python -m`` this, with what to measure.

Started by :mod:`medray.workflows.costs`: peak memory is a process's own, and a model that hangs can be given up.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import psutil
import torch

from medray.bundle.engines import torch_threads
from medray.bundle.read import Bundle
from medray.predict.predictor import Predictor
from medray.train.memory import peak_mb

LEAST = 3
"""Calls in a block, however slow."""
WARM = 3
"""Calls before, which are not counted."""


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        asked: ``bundle``, ``engine``, ``precision``, ``device``, ``threads``; ``seconds`` of timed calls in all, in so
            many ``blocks``.

    Returns:
        ``blocks`` (seconds of each call), ``peak_mb`` (MiB), ``others`` (0..1).
    """
    with torch_threads(asked["threads"]):
        bundle = Bundle.open(asked["bundle"])
        engine = bundle.predictor(
            asked["engine"], device=asked["device"], precision=asked["precision"], threads=asked["threads"]
        )
        batch = bundle.golden()[0][:1].copy()
        for _ in range(WARM):
            engine(batch)
        before = _cpu()
        blocks = [_block(engine, batch, asked["seconds"] / asked["blocks"]) for _ in range(asked["blocks"])]
        after = _cpu()
    device = torch.device("cuda" if asked["device"] == "cuda" and asked["engine"] == "torch" else "cpu")
    return {"blocks": blocks, "peak_mb": peak_mb(device), "others": _others(before, after)}


def _block(engine: Predictor, batch: Any, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST or time.perf_counter() < end:
        begin = time.perf_counter()
        engine(batch)
        times.append(time.perf_counter() - begin)
    return times


def _cpu() -> tuple[float, float, float]:
    """Seconds of CPU time: of the whole machine, idle of it, and this process's."""
    everything, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = everything.idle + getattr(everything, "iowait", 0.0)
    # Guests are counted under user already.
    total = sum(everything) - getattr(everything, "guest", 0.0) - getattr(everything, "guest_nice", 0.0)
    return total, idle, own.user + own.system


def _others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    total, idle, own = (late - early for early, late in zip(before, after, strict=True))
    return min(1.0, max(0.0, (total - idle - own) / total)) if total > 0 else 0.0


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
