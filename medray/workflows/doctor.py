"""What this machine can do, and what it lacks."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from medray.plan.cpu import cpu_info, cpu_model

DISTRIBUTION = "medray"

PURPOSE = {
    "torch": "training",
    "torchvision": "networks",
    "timm": "networks",
    "monai": "networks, augmentation, metrics",
    "segmentation-models-pytorch": "networks",
    "torchmetrics": "metrics",
    "ray": "tune, clusters, serve",
    "optuna": "search",
    "cmaes": "search by CMA-ES",
    "onnx": "bundles",
    "onnxscript": "bundles",
    "onnxruntime-gpu": "bundles, predict",
    "safetensors": "weights",
    "hydra-core": "configuration",
    "mlflow": "tracking",
    "tensorboard": "tracking",
    "optuna-dashboard": "watching a study",
    "pydicom": "DICOM",
    "pylibjpeg": "compressed DICOM",
    "highdicom": "DICOM-SEG",
    "nibabel": "NIfTI",
    "SimpleITK": "resampling, volumes",
    "pyarrow": "Parquet tables",
    "pooch": "public sets",
}
"""Libraries worth a line; the others are only named where something is wrong with them."""

IMPORTED = ("torch", "torchvision", "onnxruntime")
"""Imported for real, since these are installed and yet break: a torchvision of another torch, a missing CUDA library.
Each in a process of its own, since a broken binary may end it."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing about the machine."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library.

    Attributes:
        name: of its distribution.
        version: installed; None where it is absent.
        purpose: what it is for.
        problem: what is wrong; empty where nothing is.
        needed: whether medray depends on it, rather than an extra.
        install: the command that puts it right.
    """

    name: str
    version: str | None
    purpose: str
    problem: str
    needed: bool
    install: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found."""

    facts: tuple[Fact, ...]
    libraries: tuple[Library, ...]


def examine() -> Examination:
    """Look at this machine: a few seconds, since torch is imported."""
    with ThreadPoolExecutor() as pool:
        broken = dict(zip(IMPORTED, pool.map(_broken, IMPORTED), strict=True))
    return Examination(facts=tuple(_facts(broken)), libraries=tuple(_libraries(broken)))


def _facts(broken: dict[str, str]) -> list[Fact]:
    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    flags = set(cpu_info("flags").split())
    rows = [
        ("medray", f"{metadata.version(DISTRIBUTION)} on Python {platform.python_version()}, {platform.platform()}"),
        ("CPU", f"{cpu_model()}, {cores} cores for us of {os.cpu_count()}"),
        ("CPU bf16", _cpu_bf16(flags)),
        ("CPU int8", "yes, AVX-512 VNNI" if "avx512_vnni" in flags else "no VNNI: int8 is not faster here"),
        ("memory", f"{memory.available / 2**30:.1f} GB free of {memory.total / 2**30:.1f} GB"),
        ("shared memory", _shared_memory()),
        ("disk here", f"{disk.free / 2**30:.0f} GB free"),
    ]
    if not broken["torch"]:
        rows += _cuda()
    return [Fact(name=name, value=value) for name, value in rows]


def _cuda() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return [("GPU", "none that torch can use: training runs on the CPU")]
    rows = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if about.major >= 8 else "fp16, no bf16"
        rows.append(
            (f"GPU {index}", f"{about.name}, {about.total_memory / 2**30:.0f} GB, {about.major}.{about.minor}, {bf16}")
        )
    return [*rows, ("CUDA", str(torch.version.cuda))]


def _cpu_bf16(flags: set[str]) -> str:
    if "amx_bf16" in flags:
        return "yes, AMX: training uses it"
    if "avx512_bf16" in flags:
        return "yes, AVX-512: training uses it"
    return "no: training on the CPU is fp32"


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return "no /dev/shm: Ray will use the disk"
    size = shutil.disk_usage(folder).total
    note = "" if size > 2**30 else "; small: in a container, start it with --shm-size=2g"
    return f"{size / 2**30:.1f} GB{note}"


def _broken(module: str) -> str:
    """Why a module can't be imported; empty where it can."""
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not import: {error}"
    if done.returncode == 0:
        return ""
    return (
        f"does not import: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f'exit {done.returncode}'}"
    )


def _libraries(broken: dict[str, str]) -> list[Library]:
    from packaging.requirements import Requirement

    found: list[Library] = []
    seen: set[str] = set()
    for text in metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        extra = _extra(requirement.marker)
        if extra == "dev" or requirement.name in seen:
            continue
        if extra is None and requirement.marker is not None and not requirement.marker.evaluate():
            continue
        seen.add(requirement.name)
        try:
            version: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        problem = ""
        if version is None:
            problem = "not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            problem = f"medray wants {requirement.specifier}"
        else:
            module = requirement.name.removesuffix("-gpu")
            problem = broken.get(module, "")
        if not problem and requirement.name not in PURPOSE and extra is None:
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        target = f"'medray[{extra}]'" if extra else f"'{wanted}'"
        found.append(
            Library(
                name=requirement.name,
                version=version,
                purpose=PURPOSE.get(requirement.name, extra or ""),
                problem=problem,
                needed=extra is None,
                install=f"{sys.executable} -m pip install {target}",
            )
        )
    return found


def _extra(marker: object) -> str | None:
    match = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(marker or ""))
    return match[1] if match else None
