"""Named public data sets, fetched by pooch: resumed where a connection broke, accepted only with the pinned SHA-256.

A set is listed here only if its SHA-256 was computed from the real file; its source's own MD5 was compared as well.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.data.sweep import Progress
from medray.errors import DownloadError, MissingDependencyError

_ATTEMPTS = 5
_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two packets
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """Where a data set lies.

    Attributes:
        url: of the one file that it is.
        file: its name on disk.
        sha256: of the file.
        size: in bytes.
        task: what it is for.
        licence: as its source states it.
        description: one line.
    """

    url: str
    file: str
    sha256: str
    size: int
    task: str
    licence: str
    description: str


DATASETS: dict[str, PublicSet] = {
    "breastmnist": PublicSet(
        url="https://zenodo.org/records/10519652/files/breastmnist.npz?download=1",
        file="breastmnist.npz",
        sha256="3a22d2a4625e7dd8903f0f59030e81a3d0c222bece2e5e10927456cb50efdec1",
        size=559580,
        task="classification",
        licence="CC BY 4.0",
        description="breast ultrasound, 780 images of 28 x 28, malignant or not (MedMNIST v2)",
    ),
    "pneumoniamnist": PublicSet(
        url="https://zenodo.org/records/10519652/files/pneumoniamnist.npz?download=1",
        file="pneumoniamnist.npz",
        sha256="e1792d3f03751cb101e99f19a63b3c1941436c988665f47853417b05be250cd8",
        size=4170669,
        task="classification",
        licence="CC BY 4.0",
        description="chest X-rays of children, 5,856 images of 28 x 28, pneumonia or not (MedMNIST v2)",
    ),
}


def fetch(name: str, directory: Path, *, progress: Progress | None = None, base_url: str | None = None) -> Path:
    """Download a data set, or return what is there already with the right hash.

    An interrupted download leaves ``FILE.part`` and goes on from there the next time.

    Args:
        name: a key of :data:`DATASETS`.
        directory: where the file goes.
        progress: called with (bytes so far, bytes in all, file).
        base_url: a mirror's folder that holds the file under its own name, instead of the public source.

    Raises:
        DownloadError: an unknown name, no connection, another answer than the file, or a wrong hash (which removes it).
        MissingDependencyError: pooch is not installed.
    """
    chosen = DATASETS.get(name)
    if chosen is None:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DownloadError(f"no data set is called {name!r}.{hint} There are: {', '.join(DATASETS)}")
    try:
        import pooch
        from requests import RequestException
    except ImportError:
        raise MissingDependencyError("pooch", "downloading a data set", "pip install pooch") from None
    pooch.get_logger().setLevel("WARNING")
    url = chosen.url if base_url is None else f"{base_url.rstrip('/')}/{chosen.file}"
    part = directory / f"{chosen.file}.part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        found = pooch.retrieve(
            url,
            known_hash=f"sha256:{chosen.sha256}",
            fname=chosen.file,
            path=directory,
            downloader=_resuming(part, chosen, progress),
        )
    except RequestException as error:
        kept = f" {part.stat().st_size} bytes are kept: run it again to go on." if part.exists() else ""
        raise DownloadError(f"{url}: {_cause(error)}.{kept} Or fetch the file by hand into {directory}") from None
    except ValueError:
        raise DownloadError(
            f"{url}: what came is not {chosen.file} with SHA-256 {chosen.sha256}; it was removed. "
            "Run it again; if it stays so, the source has changed and must not be trusted"
        ) from None
    except OSError as error:
        raise DownloadError(f"{directory}: {error.strerror or error}. Choose a folder that can be written") from None
    return Path(found)


def _cause(error: Exception) -> str:
    """The innermost reason of a network error, without the wrappings of three libraries."""
    text = str(error)
    return text if len(text) <= 200 else text[:197] + "..."


def _resuming(part: Path, chosen: PublicSet, progress: Progress | None) -> Callable[[str, str, Any], None]:
    """A downloader for pooch that keeps what has come in ``part`` and asks for the rest (HTTP Range)."""
    from requests import RequestException

    def download(url: str, output_file: str, _pooch: Any) -> None:
        for attempt in range(_ATTEMPTS):
            before = part.stat().st_size if part.exists() else 0
            try:
                _receive(url, part, chosen, progress)
                break
            except RequestException as error:
                status = getattr(error.response, "status_code", None)
                refused = status is not None and status < 500 and status != 429
                if refused or attempt == _ATTEMPTS - 1:
                    raise
                came = part.exists() and part.stat().st_size > before
                time.sleep(0.1 if came else min(2.0**attempt, 8.0))
        part.replace(output_file)

    return download


def _receive(url: str, part: Path, chosen: PublicSet, progress: Progress | None) -> None:
    import requests

    have = part.stat().st_size if part.exists() else 0
    if have > chosen.size:
        part.unlink()
        have = 0
    if have == chosen.size:
        return
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == 416:  # what is kept does not belong to what is there now
            part.unlink()
        answer.raise_for_status()
        goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not goes_on:
            have = 0
        with part.open("ab" if have else "wb") as stream:
            for chunk in answer.iter_content(_CHUNK):
                have += len(chunk)
                if have > chosen.size:
                    stream.close()
                    part.unlink()
                    raise ValueError(f"more than {chosen.size} bytes")
                stream.write(chunk)
                if progress is not None:
                    progress(have, chosen.size, chosen.file)
    if have < chosen.size:
        raise requests.ConnectionError(f"the connection ended after {have} of {chosen.size} bytes")
