"""Peak memory, and what running out of it looks like."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["available", "in_use", "is_out_of_memory", "peak_mb", "reset_peak"]

GROUP = Path("/sys/fs/cgroup")


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of the peak, where the system can: CUDA's allocator, Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # 5 resets the high-water mark of resident memory (proc(5), clear_refs), since actors are reused between trials;
    # elsewhere the peak is of the whole process's life.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """The peak since :func:`reset_peak` in MiB: CUDA's allocator, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def in_use(device: torch.device) -> int:
    """Bytes now: of tensors on a CUDA device, or resident in this process; 0 where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of a CUDA device, or of main memory within the container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError):
        found = _table(Path("/proc/meminfo"))
        room = found.get("MemAvailable:", room // 1024) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((GROUP / "memory.max").read_text())  # the text "max" where there is none
        held = _table(GROUP / "memory.stat")
        cached = held.get("inactive_file", 0) + held.get("active_file", 0)  # which the kernel gives back
        room = min(room, limit - int((GROUP / "memory.current").read_text()) + cached)
    return max(0, room)


def _table(path: Path) -> dict[str, int]:
    """Names and whole numbers of a kernel's table."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on a CUDA device or in main memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("out of memory", "not enough memory", "can't allocate memory", "could not create a memory")
    )
