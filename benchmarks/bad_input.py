"""Does every reader answer damaged files with an error that names file and cause: no hang, no crash, no gigabytes?

Real files of every format are truncated, bit-flipped, zeroed, emptied, spliced, renamed, and given huge headers; each
mutant is probed and read as an image and as a mask in a child process, which is watched for time, memory and death.
1,000 mutants in the full run, 120 in the quick one; the seed makes them the same each time.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.common import Figure, Result, Target, shared_data

MUTANTS, QUICK_MUTANTS = 1000, 120
HANG_S = 30.0
_MEMORY_MB = 1024.0  # of the whole child, of which Python and the libraries are about 150


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A sound file to damage.

    Attributes:
        path: the file.
        kind: picture, nifti, dicom, series (the file is one of a series, read as its directory) or npz.
        member: the item of an archive.
    """

    path: Path
    kind: str
    member: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one mutant.

    Attributes:
        read: as an image or a mask.
        wrong: what must not be (another exception, an error that doesn't name the file, a broken image); empty if well.
        seconds: for all three calls.
        peak_mb: largest memory of the process so far.
    """

    read: bool
    wrong: tuple[str, ...]
    seconds: float
    peak_mb: float


def seeds(folder: Path) -> list[Seed]:
    """Sound files of every format among the real data."""
    dicom = folder / "dicom"
    samples = [
        *((path, "picture") for path in sorted((folder / "drive").rglob("21*.*"))),
        *((path, "picture") for path in sorted((folder / "bccd/BCCD/JPEGImages").glob("*.jpg"))[:4]),
        *((path, "picture") for path in sorted((folder / "dsb2018_nuclei/images").glob("*.png"))[:4]),
        *((path, "nifti") for path in sorted((folder / "msd_hippocampus/imagesTr").glob("*.nii.gz"))[:6]),
        *((path, "nifti") for path in sorted((folder / "msd_hippocampus/labelsTr").glob("*.nii.gz"))[:4]),
        *((path, "nifti") for path in sorted((dicom / "dcm_qa_nih/Ref").glob("EPI*.nii"))),
        *((path, "dicom") for path in sorted((dicom / "pydicom-test_files/test_files").glob("*.dcm"))),
        *((path, "dicom") for path in sorted((dicom / "highdicom/data/test_files").glob("*.dcm"))),
        *((path, "dicom") for path in sorted((dicom / "dcmqi/data/segmentations").glob("*x38x3/multiframe/*.dcm"))),
        *((path, "series") for path in sorted((dicom / "dcmqi/data/segmentations").glob("*x38x3/image/*.dcm"))),
    ]
    archives = [
        Seed(path=path, kind="npz", member=f"{name}/3")
        for path in sorted((folder / "medmnist").glob("breast*.npz"))
        for name in ("train_images", "test_images", "train_labels")
    ]
    return [*(Seed(path=path, kind=kind) for path, kind in samples), *archives]


def mutate(data: bytes, rng: random.Random, other: bytes = b"") -> tuple[str, bytes]:
    """A damaged copy of ``data`` and the name of the damage; ``other`` is a file of any kind to splice with."""
    size = len(data)
    head = max(min(size, 1024), 1)

    def flipped(count: int, reach: int) -> bytes:
        copy = bytearray(data)
        for _ in range(count):
            copy[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        return bytes(copy)

    def overwritten(block: bytes, reach: int) -> bytes:
        at = rng.randrange(max(reach - len(block), 1))
        return data[:at] + block + data[at + len(block) :]

    recipes: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "truncated": lambda: data[: rng.randrange(size)],
        "truncated in the header": lambda: data[: rng.randrange(head)],
        "bits flipped": lambda: flipped(rng.choice([1, 10, 100, 1000]), size),
        "header bits flipped": lambda: flipped(rng.choice([1, 3, 10]), head),
        "huge number in the header": lambda: overwritten(rng.choice(_HUGE), head),
        "huge claim": lambda: huge(data, rng),
        "zeroed": lambda: overwritten(bytes(rng.choice([4, 64, 4096])), size),
        "noise": lambda: overwritten(rng.randbytes(rng.choice([4, 64, 4096])), size),
        "all noise": lambda: rng.randbytes(min(size, 4096)),
        "bytes lost": lambda: data[: (at := rng.randrange(size))] + data[at + rng.choice([1, 2, 100]) :],
        "bytes gained": lambda: data[: (at := rng.randrange(size))] + rng.randbytes(rng.choice([1, 100])) + data[at:],
        "spliced": lambda: data[: rng.randrange(size)] + other[rng.randrange(max(len(other), 1)) :],
        "wrong type": lambda: other,
    }
    name = rng.choice(list(recipes))
    return name, recipes[name]()


_HUGE = (b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\x7f", b"\x7f\xff", b"\0\0\0\x40", b"\xff" * 8)


def huge(data: bytes, rng: random.Random) -> bytes:
    """``data`` with a header that claims an absurd size in its format's own fields; bits flipped where it has none."""
    if data[:2] == b"\x1f\x8b":  # NIfTI within gzip: its shape is four int16 from byte 40
        plain = bytearray(zlib.decompress(data, zlib.MAX_WBITS | 16))
        struct.pack_into("<4h", plain, 40, 3, *(rng.choice([32767, 20000, 1]) for _ in range(3)))
        packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
        return packer.compress(bytes(plain)) + packer.flush()
    copy = bytearray(data)
    if data[:4] == b"\x5c\1\0\0":
        struct.pack_into("<4h", copy, 40, 3, 32767, 32767, rng.choice([32767, 100]))
    elif data[:4] == b"\x89PNG":
        struct.pack_into(">2I", copy, 16, *rng.choice([(2**31 - 1, 2**31 - 1), (60000, 60000), (10000, 10000)]))
        struct.pack_into(">I", copy, 29, zlib.crc32(copy[12:29]))
    elif data[:3] == b"GIF":
        struct.pack_into("<2H", copy, 6, 65535, 65535)
    elif (at := data.find(b"\xff\xc0\0")) > 0:  # JPEG's start of frame, also inside DICOM
        struct.pack_into(">2H", copy, at + 5, 65535, 65535)
    elif (at := data.find(b"\xff\x4f\xff\x51")) > 0:  # JPEG 2000's size
        struct.pack_into(">2I", copy, at + 8, 2**31, 2**31)
    elif (at := data.find(b"\x28\0\x10\0US\2\0")) > 0:  # DICOM's Rows
        struct.pack_into("<H", copy, at + 8, 65535)
    elif (at := data.find(b"'shape': (")) > 0:
        copy[at + 10 : at + 13] = b"999"
    else:
        copy[rng.randrange(len(copy))] ^= 0xFF
    return bytes(copy)


def attempt(path: Path, member: str = "") -> Outcome:
    """Probe ``path`` and read it as image and as mask; say what went wrong beyond a MedrayError."""
    import numpy as np

    from medray.data.readers import probe, read_image, read_mask
    from medray.errors import MedrayError

    reference = f"{path}#{member}" if member else str(path)
    read, wrong, started = False, [], time.monotonic()
    for call in (probe, read_image, read_mask):
        try:
            result = call(reference, path.parent)
        except MedrayError as error:
            if path.name not in str(error) or str(error).endswith(": "):
                wrong.append(f"{call.__name__}: does not name the file or the cause: {error}")
        except Exception as error:
            wrong.append(f"{call.__name__}: {type(error).__name__}: {error}")
        else:
            if call is read_image:
                read = True
                if not np.isfinite(result.array).all() or result.array.dtype != np.float32 or result.array.size == 0:
                    wrong.append("read_image: returned an array that is empty, not float32 or not finite")
            elif call is read_mask:
                read = True
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    return Outcome(read=read, wrong=tuple(wrong), seconds=time.monotonic() - started, peak_mb=peak)


def mutant(seed: Seed, rng: random.Random, other: bytes, folder: Path) -> tuple[str, Path]:
    """Write a mutant into an empty folder: the damage's name, and the path that is to be read."""
    damage, data = mutate(seed.path.read_bytes(), rng, other)
    if seed.kind == "series":
        place = folder / "series"
        place.mkdir()
        for file in seed.path.parent.iterdir():
            shutil.copyfile(file, place / file.name)
        (place / seed.path.name).write_bytes(data)
        return damage, place
    path = folder / f"mutant{''.join(seed.path.suffixes[-2:]) if seed.kind == 'nifti' else seed.path.suffix}"
    path.write_bytes(data)
    return damage, path


def _child(connection: Connection) -> None:
    """Attempt what arrives until None does."""
    while (job := connection.recv()) is not None:
        path, member = job
        connection.send(attempt(path, member))


class _Watched:
    """A child process that is started anew after a hang or a death."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._start()

    def _start(self) -> None:
        self._here, there = self._context.Pipe()
        self._process = self._context.Process(target=_child, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def attempt(self, path: Path, member: str) -> Outcome | str:
        """The outcome, or "hang" or "crash"."""
        self._here.send((path, member))
        try:
            if self._here.poll(HANG_S):
                return self._here.recv()
            verdict = "hang"
        except (EOFError, ConnectionResetError):
            verdict = "crash"
        self._process.kill()
        self._process.join()
        self._start()
        return verdict

    def close(self) -> None:
        self._here.send(None)
        self._process.join(10)


def run(quick: bool) -> Result:
    """Mutate, attempt, count."""
    found = seeds(shared_data())
    groups = [[seed for seed in found if seed.kind == kind] for kind in ("picture", "nifti", "dicom", "series", "npz")]
    count = QUICK_MUTANTS if quick else MUTANTS
    rng = random.Random(20)
    watched = _Watched()
    outcomes: list[Outcome] = []
    bad: dict[str, list[str]] = {"hangs": [], "crashes": [], "wrong_answers": []}
    try:
        for number in range(count):
            # Formats in turn, DICOM (with most ways to be broken) every second time.
            group = groups[2] if number % 2 else groups[number // 2 % len(groups)]
            seed, other = rng.choice(group), rng.choice(found).path.read_bytes()
            with tempfile.TemporaryDirectory() as folder:
                damage, path = mutant(seed, rng, other, Path(folder))
                outcome = watched.attempt(path, seed.member)
            label = f"{number} {seed.path.name}, {damage}"
            if isinstance(outcome, str):
                bad["hangs" if outcome == "hang" else "crashes"].append(label)
                continue
            outcomes.append(outcome)
            bad["wrong_answers"] += [f"{label}: {text}" for text in outcome.wrong]
    finally:
        watched.close()
    return _result(outcomes, bad, count)


def _result(outcomes: Sequence[Outcome], bad: dict[str, list[str]], count: int) -> Result:
    for kind, labels in bad.items():
        for label in labels:
            print(f"{kind}: {label}", file=sys.stderr)
    figures = {
        "mutants": Figure(value=count, unit="files"),
        "refused": Figure(value=sum(not outcome.read for outcome in outcomes), unit="files"),
        "still_readable": Figure(value=sum(outcome.read for outcome in outcomes), unit="files"),
        **{kind: Figure(value=len(labels), unit="files") for kind, labels in bad.items()},
        "slowest": Figure(value=max((outcome.seconds for outcome in outcomes), default=0.0), unit="s"),
        "peak_memory": Figure(value=max((outcome.peak_mb for outcome in outcomes), default=0.0), unit="MB"),
    }
    targets = {
        **{kind: Target(op="==", value=0) for kind in bad},
        "slowest": Target(op="<=", value=10.0),
        "peak_memory": Target(op="<=", value=_MEMORY_MB),
    }
    notes = (
        "still_readable: the damage left a valid file, or hit pixels of a format without a checksum.",
        "peak_memory is of the whole child process over all mutants, Python and libraries included.",
    )
    return Result(figures=figures, targets=targets, notes=notes)
