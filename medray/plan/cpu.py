"""What the system says of the processor. Imports no library, so that a broken one can be told of."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["cpu_info", "cpu_model"]


def cpu_info(key: str, path: Path = Path("/proc/cpuinfo")) -> str:
    """The first processor's value of ``model name``, ``flags`` and such; empty where the system doesn't say."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    rows = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in rows if name.strip() == key), "")


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    return cpu_info("model name") or platform.processor() or platform.machine()
