"""Ask a server: ``medray.Client(url, key).predict("scan.nii.gz")``, and ``medray predict --server URL``."""

from __future__ import annotations

import json
import random
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, Literal

from medray.bundle.engines import Selection
from medray.data.writers.atomic import appearing
from medray.errors import MedrayError, ServingError
from medray.tasks.catalogue import find_task
from medray.workflows.inputs import Input, expand
from medray.workflows.prediction import Answer, PredictionSummary, Progress, write_summary

Form = Literal["nifti", "png", "dicom", "sr"]
ENVIRONMENT = "MEDRAY_API_KEY"
"""Environment variable of the command line's key: an option would be seen by every user of the machine."""
_ACCEPT = {
    "nifti": "application/nifti",
    "png": "image/png",
    "dicom": "application/dicom",
    "sr": "application/dicom; object=sr",
}
_AGAIN = {408, 409, 429, 500, 502, 503, 504}
"""Statuses after which the same request may do better: busy, a replica that died, one that starts."""
_JOBS = 3
"""How often an image is sent whose job was lost with its process, or failed for a reason that may pass."""
_SUFFIX = {"nifti": "_seg.nii.gz", "png": "_overlay.png", "dicom": "_seg.dcm", "sr": "_sr.dcm"}


class Client:
    """Asks one server.

    A request is tried again for ``patience`` seconds, always under the same Idempotency-Key, so that nothing is
    computed or accounted for twice.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        key: an API key; None where the server needs none.
        patience: seconds for which a busy or restarting server is asked again, from the first failure.
        timeout: seconds that one try may take.

    Raises:
        ServingError: the URL is none of HTTP's.
    """

    def __init__(self, url: str, key: str | None = None, *, patience: float = 15.0, timeout: float = 300.0) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ServingError(f"{url!r} is no server's URL; give one such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._key, self._patience, self._timeout = key, patience, timeout

    def models(self) -> dict[str, Any]:
        """What ``/v1/models`` says: the default, and each version with its classes and engine."""
        return json.loads(self._ask("GET", "/v1/models", None, {}))

    def predict(
        self,
        image: str | Path,
        *,
        model: str | None = None,
        version: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> dict[str, Any]:
        """The answer for one image as ``/v1/predict`` gives it: classes, probabilities, volumes, flags, engine.

        Args:
            image: a file of any kind that is read, or a folder with the files of one DICOM series.
            model: None for the server's default.
            version: None lets the server choose.
            progress: hears how far it is, 0 to 1. The image is then a job of the server's, which may take as long as it
                likes: no connection is held meanwhile.

        Raises:
            ServingError: the server refuses the image, or can't be reached within ``patience``.
        """
        if progress is None:
            return json.loads(self._send(image, "application/json", model, version))
        return json.loads(self._by_job(image, "application/json", model, version, progress))

    def save(
        self, image: str | Path, path: Path, form: Form, *, model: str | None = None, version: str | None = None
    ) -> Path:
        """Write the mask (NIfTI, DICOM-SEG), the overlay (PNG) or the figures (DICOM-SR) of one image to ``path``.

        Raises:
            ServingError: as :meth:`predict`; or there is no such form of this image's answer.
        """
        content = self._send(image, _ACCEPT[form], model, version)
        with appearing(path) as partial:
            partial.write_bytes(content)
        return path

    def _by_job(
        self, image: str | Path, accept: str, model: str | None, version: str | None, progress: Callable[[float], None]
    ) -> bytes:
        pause = 0.1
        for _ in range(_JOBS):
            job = json.loads(self._send(image, accept, model, version, route="/v1/jobs"))
            place = f"/v1/jobs/{job['id']}"
            while job["state"] == "running":
                progress(float(job["progress"]))
                time.sleep(pause)
                pause = min(2.0, pause * 1.3)
                job = json.loads(self._ask("GET", place, None, {}))
            error = job["error"] or {}
            if job["state"] == "done" or (job["state"] == "failed" and error.get("status") not in _AGAIN):
                break
        if job["state"] != "done":
            raise ServingError(f"{self.url} could not answer ({error.get('status') or 'lost'}): {error.get('message')}")
        answer = self._ask("GET", f"{place}/answer", None, {})
        progress(1.0)
        self._try("DELETE", place, None, {})  # once: it goes by itself, later
        return answer

    def _send(
        self, image: str | Path, accept: str, model: str | None, version: str | None, *, route: str = "/v1/predict"
    ) -> bytes:
        given = {name: value for name, value in (("model", model), ("version", version)) if value is not None}
        query = f"?{urllib.parse.urlencode(given)}" if given else ""
        headers = {"Accept": accept, "Idempotency-Key": uuid.uuid4().hex, "Content-Type": "application/octet-stream"}
        place = Path(image)
        try:
            with tempfile.TemporaryFile() if place.is_dir() else place.open("rb") as file:
                if place.is_dir():
                    _pack(place, file)
                return self._ask("POST", f"{route}{query}", file, headers)
        except OSError as error:
            raise ServingError(f"{place}: can't be read ({error.strerror or error})") from None

    def _ask(self, method: str, path: str, body: IO[bytes] | None, headers: dict[str, str]) -> bytes:
        until: float | None = None
        pause = 0.1
        while True:
            wait, error = self._try(method, path, body, headers)
            if isinstance(error, bytes):
                return error
            if until is None:  # from the first failure: a try that fails late has used up nothing
                until = time.monotonic() + self._patience
            wait = max(pause * random.uniform(0.5, 1.5), wait or 0.0)
            if not error.again or time.monotonic() + wait > until:
                raise ServingError(str(error))
            time.sleep(wait)
            pause = min(2.0, pause * 2)

    def _try(
        self, method: str, path: str, body: IO[bytes] | None, headers: dict[str, str]
    ) -> tuple[float | None, bytes | _FailedError]:
        """One try: what was answered; or why not, and the seconds that the server asks for before the next."""
        request = urllib.request.Request(self.url + path, method=method, headers=dict(headers))
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        if body is not None:
            request.data = body
            request.add_header("Content-Length", str(body.seek(0, 2)))  # after the data, which takes it away
            body.seek(0)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return None, answer.read()
        except urllib.error.HTTPError as error:
            return _seconds(error.headers.get("Retry-After")), _FailedError(
                f"{self.url} refuses ({error.code}): {_message(error)}", again=error.code in _AGAIN
            )
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            return None, _FailedError(f"{self.url} can't be reached: {reason}", again=True)


class _FailedError(Exception):
    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isascii() and text.isdigit() else None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(1 << 20))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        return error.reason


def _pack(folder: Path, file: IO[bytes]) -> None:
    """The files of a folder as a zip, numbered: their names may be a patient's."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number, path in enumerate(sorted(p for p in folder.iterdir() if p.is_file())):
            archive.write(path, f"{number:05}.dcm")


def predict_by_server(
    url: str,
    inputs: Sequence[str],
    out_dir: Path,
    *,
    key: str | None = None,
    model: str | None = None,
    progress: Progress | None = None,
    make: Callable[..., Client] = Client,
) -> PredictionSummary:
    """Have a server answer every image; one that is refused doesn't stop the rest.

    Segmentation writes, for each input, ``NAME_seg`` as .nii.gz or .dcm, as the input is, or ``NAME_overlay.png``
    of a picture; classification ``predictions.csv``; ``summary.json`` tells of all.

    Args:
        url: of the server.
        inputs: files, folders, globs.
        out_dir: is made.
        key: an API key.
        model: None for the server's default.
        progress: called after each image.
        make: of the client.

    Raises:
        ServingError: the server can't be reached, or has no such model.
        DataError: there is no image at all.
    """
    client = make(url, key)
    listed = client.models()
    name = model or listed["default"]
    # One version for all images, so that what is told of it holds for each: the one that most requests get.
    served = max((one for one in listed["models"] if one["name"] == name), key=lambda one: one["share"], default=None)
    if served is None:
        names = ", ".join(dict.fromkeys(one["name"] for one in listed["models"]))
        raise ServingError(f"{url} has no model {name!r}; name one with --model: {names}")
    out_dir.mkdir(parents=True, exist_ok=True)
    found = expand(inputs, ndim=served["ndim"], channels=1)
    answers = []
    for count, item in enumerate(found, start=1):
        try:
            answers.append(_answer(client, item, served, out_dir))
        except MedrayError as error:
            answers.append(Answer(image=" + ".join(item.references), error=str(error)))
        if progress is not None:
            progress(count, len(found), item.name)
    summary = PredictionSummary(
        bundle=served["bundle"],
        runtime=f"{served['engine']} {served['precision']} at {url}",
        selection=Selection(
            engine=served["engine"], precision=served["precision"], fallback_reason=served["fallback_reason"]
        ),
        intended_use=served["intended_use"],
        directory=out_dir,
        answers=tuple(answers),
    )
    write_summary(summary, tuple(served["classes"]), table=not find_task(served["task"]).dense)
    return summary


def _answer(client: Client, item: Input, served: dict[str, Any], out_dir: Path) -> Answer:
    (reference,) = item.references
    if not find_task(served["task"]).dense:
        found = client.predict(reference, model=served["name"], version=served["version"])
        return Answer(
            image=reference,
            output="predictions.csv",
            classes=tuple(found["classes"]),
            probabilities=found["probabilities"],
            seconds=found["seconds"],
        )
    form = _form(Path(reference))
    target = out_dir / f"{item.name}{_SUFFIX[form]}"
    path = client.save(reference, target, form, model=served["name"], version=served["version"])
    return Answer(image=reference, output=str(path.relative_to(out_dir)))


def _form(path: Path) -> Form:
    if path.is_dir():
        return "dicom"
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        return "dicom"
    return "png" if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"II", b"MM")) else "nifti"
