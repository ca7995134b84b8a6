"""Does a server stand damaged and hostile bodies: no 5xx, no file left, no growth, and healthy after?

Pictures, NIfTI, DICOM, arrays, zips and tensor requests, made here, are cut, flipped, spliced and doubled and sent to a
real server under all of its routes and many media types: 10,000 in the full run, 300 in the quick one.
"""

from __future__ import annotations

import gzip
import http.client
import io
import json
import random
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
from PIL import Image as Pillow

from benchmarks._server import serving
from benchmarks.common import Figure, Result, Target
from benchmarks.serve import write_resnet

BODIES, QUICK_BODIES = 10_000, 300
PATHS = ("/v1/predict", "/v1/predict?version=1", "/v1/explain", "/v2/models/resnet/infer")
MEDIA = ("", "application/octet-stream", "image/png", "application/dicom", "application/zip", "text/plain",
         "multipart/form-data; boundary=x", "multipart/form-data", "application/json")  # fmt: skip


def seeds() -> list[bytes]:
    """Sound bodies of every kind, small."""
    rng = np.random.default_rng(0)
    picture, array, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Pillow.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(picture, format="PNG")
    np.save(array, rng.random((3, 24, 24)).astype(np.float32))
    dicom = bytes(128) + b"DICM" + rng.integers(0, 256, 600, dtype=np.uint8).tobytes()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.dcm", dicom)
        file.writestr("b.dcm", bytes(128) + b"DICM" + bytes(100_000))
    volume = nib.Nifti1Image(rng.random((8, 8, 8)).astype(np.float32), np.eye(4)).to_bytes()
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": [0.5] * 3072}
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="../../a"\r\n\r\n' + picture.getvalue()
    return [
        picture.getvalue(),
        array.getvalue(),
        archive.getvalue(),
        dicom,
        volume,
        gzip.compress(volume),
        gzip.compress(bytes(1 << 20)),
        json.dumps({"inputs": [tensor]}).encode(),
        part + b"\r\n--x--\r\n",
    ]


def mutant(rng: random.Random, sound: list[bytes]) -> bytes:
    """A damaged body."""
    body = bytearray(rng.choice(sound))
    for _ in range(rng.choice((0, 1, 4, 32))):
        body[rng.randrange(len(body))] = rng.randrange(256)
    match rng.randrange(5):
        case 0:
            del body[rng.randrange(len(body)) :]
        case 1:
            other = rng.choice(sound)
            body[rng.randrange(len(body)) :] = other[rng.randrange(len(other)) :]
        case 2:
            body *= 2
    return bytes(body)


def send(connection: http.client.HTTPConnection, rng: random.Random, sound: list[bytes]) -> int:
    """One damaged request's status; 0 where the server cut the connection."""
    body = mutant(rng, sound)
    headers = {"Content-Type": rng.choice(MEDIA)}
    if rng.random() < 0.2:
        headers["Accept"] = rng.choice(("application/nifti", "application/dicom", "text/html", "*/*;q=x", "image/png"))
    if rng.random() < 0.2:
        headers["Inference-Header-Content-Length"] = rng.choice(("0", "-1", "10", str(len(body)), "9" * 30))
    try:
        connection.request("POST", rng.choice(PATHS), body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0


def run(quick: bool) -> Result:
    """Figures: answers of the server's own fault, files left behind, growth of memory, and whether it is well after."""
    rng, sound, statuses = random.Random(0), seeds(), Counter[int]()
    count = QUICK_BODIES if quick else BODIES
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        bundle = write_resnet(place / "bundle", size=32)
        limits = {"body_mb": 16, "unpacked_mb": 64}
        with serving(place / "server", {"resnet": bundle}, limits=limits) as address:
            before_files = set(Path(tempfile.gettempdir()).glob("medray-*"))
            connection = http.client.HTTPConnection(*address, timeout=120)
            sizes = []
            for number in range(count):
                statuses[send(connection, rng, sound)] += 1
                if number in (count // 3, count - 1):
                    sizes.append(_megabytes(place))
            connection.request("GET", "/v2/health/ready")
            well = connection.getresponse().status == 200
            left = set(Path(tempfile.gettempdir()).glob("medray-*")) - before_files
    print(dict(sorted(statuses.items())))
    figures = {
        "server_errors": Figure(value=float(sum(n for status, n in statuses.items() if status >= 500))),
        "cut": Figure(value=float(statuses[0])),
        "files_left": Figure(value=float(len(left))),
        "growth": Figure(value=sizes[-1] - sizes[0], unit="MB"),
        "healthy_after": Figure(value=float(well)),
        "bodies": Figure(value=float(count)),
    }
    targets = {
        "server_errors": Target(op="==", value=0.0),
        "files_left": Target(op="==", value=0.0),
        "growth": Target(op="<=", value=100.0),
        "healthy_after": Target(op="==", value=1.0),
    }
    return Result(figures=figures, targets=targets, notes=["growth: of the replicas' memory over the last two thirds"])


def _megabytes(place: Path) -> float:
    """Of the replicas of the server whose folder this is."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if "Replica" in " ".join(process.cmdline()) and str(place) in " ".join(process.environ().values()):
                total += process.memory_info().rss / 1e6
        except (psutil.Error, OSError):
            continue
    return total
