"""What the machine at hand can do, as far as the plan needs to know."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine.

    Attributes:
        cpus: cores that this process may use.
        memory: bytes of main memory (of the container, where it is limited).
        gpus: CUDA devices.
        gpu_memory: bytes on the smallest of them; 0 without one.
    """

    cpus: int
    memory: int
    gpus: int = 0
    gpu_memory: int = 0

    @property
    def device(self) -> str:
        """``cuda`` or ``cpu``."""
        return "cuda" if self.gpus else "cpu"

    @property
    def training_memory(self) -> int:
        """Bytes that one training run may fill: the GPU's, or half of main memory."""
        return int(self.gpu_memory * 0.85) if self.gpus else self.memory // 2

    @property
    def note(self) -> str:
        """One line for a person."""
        where = f"{self.gpus} GPU, {self.gpu_memory / GIB:.0f} GiB" if self.gpus else "no GPU"
        return f"{self.cpus} cores, {self.memory / GIB:.0f} GiB, {where}"

    @classmethod
    def here(cls) -> Machine:
        """The machine that this process runs on."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        smallest = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0)
        return cls(cpus=len(os.sched_getaffinity(0)), memory=_memory(), gpus=gpus, gpu_memory=smallest)


def _memory() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:  # noqa: PTH123 - a kernel file, read once
                text = file.read().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(physical, int(text))
    return physical
