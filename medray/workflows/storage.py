"""A run's folder kept in an S3-compatible store, so that the run goes on when its disk is gone.

    <url>/index.json           every file of the run: name, size, SHA-256; and which folder wrote it
    <url>/objects/<SHA-256>    their contents

Objects come first, then the index, in one PUT, which S3 makes whole or not at all; what no index names any more goes
last. So a kill at any instant leaves a store that holds one moment of the run. Trials are in it when they are said to
have ended; checkpoints follow within seconds. Credentials, region and endpoint come from AWS's standard environment.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from medray.errors import ConfigError, StorageError
from medray.workflows.sitting import disown

__all__ = [
    "Entry",
    "RunStore",
    "TakenOverError",
    "bring",
    "files_of",
    "is_address",
    "parse_index",
    "place_of",
    "read_mark",
    "write_mark",
]

MARK = "storage.json"
"""In a run's folder: where it is kept, and what this folder is called there."""
_INDEX, _OBJECTS, _VERSION = "index.json", "objects", 1
_DATABASE = "study.db"
_LEFT_OUT = frozenset({MARK, ".study.lock", f"{_DATABASE}-wal", f"{_DATABASE}-shm"})
_CHUNK = 8 * 2**20  # bytes
_LONGEST = 500  # characters of a name
_MOST = 64 * 2**20  # bytes of an index: beyond, it is none of ours
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[\w!.*'() /=+@:,-]*")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of a run: its bytes and their SHA-256, under which the store has them."""

    size: int
    sha256: str


class RunStore:
    """One run's place in a store.

    Args:
        filesystem: a ``pyarrow.fs.FileSystem``.
        root: of the run in it.
        url: for messages and for ``storage.json``.
    """

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._filesystem, self._root, self.url = filesystem, root.rstrip("/"), url
        self._measured: dict[str, tuple[tuple[int, int, int], int, str]] = {}

    @classmethod
    def at(cls, url: str) -> RunStore:
        """The place that ``s3://bucket/prefix/name`` names.

        Raises:
            ConfigError: another kind of address, or one that names no folder in a bucket.
        """
        bucket, key = _parse(url)
        return cls(_s3(), f"{bucket}/{key}", f"s3://{bucket}/{key}")

    def holds_run(self) -> bool:
        """Whether there is one already."""
        return self._index() is not None

    def fetch(self, directory: Path) -> None:
        """Bring the run to ``directory``, which must not exist; it appears there whole or not at all.

        Raises:
            StorageError: no run is there, the store can't be read, or what it holds is damaged or hostile.
        """
        index = self._index()
        if index is None:
            raise StorageError(f"{self.url} holds no run. Give s3://BUCKET/PREFIX/NAME, NAME being the run's own")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            partial = Path(scratch) / "run"
            partial.mkdir()
            self._check_room(partial, index[1])
            for name, entry in sorted(index[1].items()):
                self._download(entry, partial / name, name)
            write_mark(partial, self.url, former=index[0])
            disown(partial)
            try:
                partial.rename(directory)
            except OSError as error:
                raise StorageError(
                    f"{directory} is there already ({error.strerror}): resume that one, or move it away"
                ) from None

    def claim(self, directory: Path) -> dict[str, Entry]:
        """Send the folder for the first time in this sitting, which makes it the one that the run goes on in.

        Returns:
            what the store holds now.

        Raises:
            StorageError: the store can't be written, or holds a later state of this run, from another folder.
        """
        index = self._index()
        own = read_mark(directory)
        if index is not None and index[0] not in (own.get("writer"), own.get("former")):
            raise StorageError(
                f"{self.url} was last written from another folder than {directory}, and may be further than it. Move "
                f"this folder away and go on from the store by --resume {self.url}"
            )
        entries = self.publish(directory, known=index[1] if index else {}, writer=index[0] if index else None)
        self._check_owner(self._name_of(directory))  # two that fetched the same state: the second to write has it
        self._sweep({entry.sha256 for entry in entries.values()})
        return entries

    def publish(self, directory: Path, *, known: Mapping[str, Entry], writer: str | None) -> dict[str, Entry]:
        """Make the store hold what the folder holds now.

        Args:
            directory: the run's folder.
            known: what the store holds already.
            writer: whose the index must still be; None: anybody's.

        Returns:
            what the store holds now.

        Raises:
            StorageError: the store can't be written, the folder is gone, or another one has taken the run over.
        """
        own = self._name_of(directory)
        have = {entry.sha256 for entry in known.values()}
        entries: dict[str, Entry] = {}
        with tempfile.TemporaryDirectory(prefix="medray-store-") as scratch:
            for name, path in _files(directory, Path(scratch)):
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    size, digest = self._measure(name, file)
                    if digest in have or self._upload(file, size, digest):
                        have.add(digest)
                        entries[name] = Entry(size=size, sha256=digest)
                    elif name in known:
                        entries[name] = known[name]
        if writer is not None:
            self._check_owner(writer)
        self._name_of(directory)
        self._write_index(entries, own)
        gone = {entry.sha256 for entry in known.values()} - {entry.sha256 for entry in entries.values()}
        for digest in gone:
            with contextlib.suppress(OSError):
                self._filesystem.delete_file(f"{self._root}/{_OBJECTS}/{digest}")
        return entries

    def _measure(self, name: str, file: IO[bytes]) -> tuple[int, str]:
        """Size and SHA-256 of a file; one that was measured and has not changed since isn't read again."""
        stat = os.fstat(file.fileno())
        mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        known = self._measured.get(name)
        if known is None or known[0] != mark:
            known = (mark, *_measure(file))
            self._measured[name] = known
        return known[1], known[2]

    # The store itself ------------------------------------------------------------------------------------------------

    def _index(self) -> tuple[str, dict[str, Entry]] | None:
        """Who wrote it, and the files; None where there is none."""
        path = f"{self._root}/{_INDEX}"
        try:
            with self._filesystem.open_input_stream(path) as stream:
                text = stream.read(_MOST + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreachable("read", error) from error
        if len(text) > _MOST:
            raise StorageError(f"{self.url}: {_INDEX} has more than {_MOST} bytes: it is not a run's")
        return parse_index(text, f"{self.url}/{_INDEX}")

    def _write_index(self, entries: Mapping[str, Entry], writer: str) -> None:
        document = {
            "version": _VERSION,
            "writer": writer,
            "host": socket.gethostname(),
            "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(entries.items())},
        }
        try:
            with self._filesystem.open_output_stream(f"{self._root}/{_INDEX}") as stream:
                stream.write(json.dumps(document, indent=1).encode())
        except OSError as error:
            raise self._unreachable("written", error) from error

    def _name_of(self, directory: Path) -> str:
        """Under which a folder writes. Without its mark it is gone, with its disk perhaps: the store has the run."""
        name = read_mark(directory).get("writer")
        if not name:
            raise StorageError(f"{directory} is gone, or has lost its {MARK}: {self.url} is left as it is")
        return name

    def _check_owner(self, writer: str) -> None:
        index = self._index()
        if index is not None and index[0] != writer:
            raise TakenOverError(
                f"{self.url}: another process has taken this run over and goes on with it; this one may not write "
                f"there any more. Its folder is left as it is"
            )

    def _upload(self, file: IO[bytes], size: int, digest: str) -> bool:
        """The first ``size`` bytes, which are those that were measured: a log may have grown since.

        Returns:
            whether they were still the same: a file that was written anew in between is left for the next time.
        """
        path, sent, left = f"{self._root}/{_OBJECTS}/{digest}", hashlib.sha256(), size
        file.seek(0)
        try:
            with self._filesystem.open_output_stream(path) as stream:
                while left and (part := file.read(min(_CHUNK, left))):
                    stream.write(part)
                    sent.update(part)
                    left -= len(part)
            if sent.hexdigest() != digest:
                self._filesystem.delete_file(path)
                return False
        except OSError as error:
            raise self._unreachable("written", error) from error
        return True

    def _download(self, entry: Entry, path: Path, name: str) -> None:
        digest, left = hashlib.sha256(), entry.size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                self._filesystem.open_input_stream(f"{self._root}/{_OBJECTS}/{entry.sha256}") as stream,
                path.open("xb") as file,
            ):
                while part := stream.read(min(_CHUNK, left + 1)):
                    digest.update(part)
                    file.write(part)
                    left -= len(part)
                    if left < 0:
                        break
        except OSError as error:
            raise self._unreachable(f"read ({name})", error) from error
        if left or digest.hexdigest() != entry.sha256:
            raise StorageError(f"{self.url}: {name} is not what the index says (size or SHA-256); nothing was taken")

    def _check_room(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        needed, free = sum(entry.size for entry in entries.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise StorageError(
                f"{self.url} holds {needed / 1e6:.0f} MB, and {folder.parent.parent} has room for {free / 1e6:.0f}: "
                f"free some, or start in another folder"
            )

    def _sweep(self, named: set[str]) -> None:
        """Remove what a killed process had sent and no index came to name."""
        from pyarrow.fs import FileSelector

        with contextlib.suppress(OSError):
            for found in self._filesystem.get_file_info(FileSelector(f"{self._root}/{_OBJECTS}", allow_not_found=True)):
                if _DIGEST.fullmatch(found.base_name) and found.base_name not in named:
                    self._filesystem.delete_file(found.path)

    def _unreachable(self, what: str, error: OSError) -> StorageError:
        said = " ".join(str(error).split())[:400]
        return StorageError(
            f"{self.url} can't be {what}: {said}. Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a "
            f"profile, or the machine's role; another server than AWS's from AWS_ENDPOINT_URL"
        )


class TakenOverError(StorageError):
    """Another folder writes this run now."""


def is_address(text: str) -> bool:
    """Whether this means a store rather than a folder."""
    return "://" in text


def place_of(directory: Path, storage: str | None) -> str | None:
    """Where the run in a folder is kept: below ``storage``, or where it was before; None for nowhere."""
    return f"{storage.rstrip('/')}/{directory.name}" if storage else read_mark(directory).get("url")


def bring(url: str, runs: Path) -> Path:
    """Fetch a run to a folder in ``runs`` that is named as it is in the store.

    Raises:
        ConfigError, StorageError: as :meth:`RunStore.at` and :meth:`RunStore.fetch`.
    """
    store = RunStore.at(url)
    name = store.url.rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{url!r} names no run: give s3://BUCKET/PREFIX/NAME, NAME being the run's own")
    directory = runs / name
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is there already: resume that one by its folder, or move it away")
    store.fetch(directory)
    return directory


def write_mark(directory: Path, url: str, *, former: str | None = None) -> None:
    """Name the store in a run's folder, and the folder itself, once.

    Args:
        directory: of the run.
        url: of its place in the store.
        former: the folder that wrote the store before this one.
    """
    partial = directory / f"{MARK}.part"
    mark = {"url": url, "writer": read_mark(directory).get("writer") or uuid.uuid4().hex}
    partial.write_text(json.dumps(mark | ({"former": former} if former else {})), encoding="utf-8")
    partial.replace(directory / MARK)


def parse_index(text: bytes, where: str) -> tuple[str, dict[str, Entry]]:
    """The writer and the files of an index. A store is somebody else's machine: names that lead out are refused.

    Raises:
        StorageError: not an index, of another version, or with a name that is no plain path below the run's folder.
    """
    try:
        document = json.loads(text)
        if document["version"] != _VERSION:
            raise StorageError(f"{where} is of version {document['version']!r}, this medray reads version {_VERSION}")
        writer, files = str(document["writer"]), dict(document["files"])
        entries = {str(name): Entry(size=int(one["size"]), sha256=str(one["sha256"])) for name, one in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{where} is damaged ({error!r}): it is not the index of a run") from None
    for name, entry in entries.items():
        if not _is_plain(name):
            raise StorageError(f"{where} names {name!r}, which is no path below a run's folder; nothing was taken")
        if entry.size < 0 or not _DIGEST.fullmatch(entry.sha256):
            raise StorageError(f"{where}: size or SHA-256 of {name!r} can't be")
    return writer, entries


def _parse(url: str) -> tuple[str, str]:
    """(bucket, key) of an address."""
    parts = urlsplit(url)
    bucket, key = parts.netloc, "/".join(filter(None, parts.path.split("/")))
    if parts.scheme != "s3":
        raise ConfigError(
            f"{url!r}: a run's store is s3://BUCKET/PREFIX. For a shared folder no store is needed: start there, and "
            f"runs/ lies in it"
        )
    bad = parts.query or parts.fragment or not _BUCKET.fullmatch(bucket) or not _KEY.fullmatch(key)
    if bad or {"..", "."} & set(key.split("/")):
        # Not the address itself: it may hold a password, and messages are logged.
        raise ConfigError(
            f"an address at {parts.hostname}: must be s3://BUCKET/PREFIX, without credentials; those come from "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role"
        )
    return bucket, key


def _s3() -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"AWS_ENDPOINT_URL={endpoint}: must be http://HOST:PORT or https://HOST")
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region or endpoint:
        options["region"] = region or "us-east-1"
    return S3FileSystem(
        connect_timeout=10.0,
        request_timeout=60.0,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=4),
        **options,
    )


def _is_plain(name: str) -> bool:
    """Whether a name stays below the folder that it is put into, on any system."""
    parts = PurePosixPath(name).parts
    printable = name.isprintable() and not set("\\:") & set(name) and len(name) <= _LONGEST
    return (
        printable and bool(parts) and name == "/".join(parts) and ".." not in parts and parts[0] != "/" and name != MARK
    )


def read_mark(directory: Path) -> dict[str, str]:
    """``url``, ``writer`` and ``former`` of a run's folder; nothing where it is kept in no store."""
    with contextlib.suppress(OSError, ValueError):
        stored = json.loads((directory / MARK).read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return {str(key): str(value) for key, value in stored.items()}
    return {}


def _files(directory: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """(name, where to read it), study.db first, as a snapshot: trials that it calls ended have their files by then."""
    database = directory / _DATABASE
    if database.is_file():
        snapshot = scratch / _DATABASE
        with (
            contextlib.closing(
                sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=60)
            ) as source,
            contextlib.closing(sqlite3.connect(snapshot)) as target,
        ):
            source.backup(target)
        yield _DATABASE, snapshot
    for path in files_of(directory):
        name = path.relative_to(directory).as_posix()
        if name != _DATABASE:
            yield name, path


def files_of(directory: Path) -> Iterator[Path]:
    """What belongs to a run: no scratch of a process, nothing half written."""
    for folder, folders, names in os.walk(directory):
        top = Path(folder) == directory
        folders[:] = sorted(name for name in folders if not (top and name.startswith(".")))
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(".part") or (top and name in _LEFT_OUT) or path.is_symlink():
                continue
            if _is_plain(path.relative_to(directory).as_posix()):  # nothing that could not be fetched again
                yield path


def _measure(file: IO[bytes]) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while part := file.read(_CHUNK):
        digest.update(part)
        size += len(part)
    return size, digest.hexdigest()
