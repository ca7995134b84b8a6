"""The models in one replica: opened, checked, shared out, and changed while requests run.

The configuration file is the desired state. When it changes, or a bundle in its place is written anew, what is new is
opened and has to reproduce its golden outputs beside what answers meanwhile; then one assignment puts it in place. What
is no longer wanted goes when its last request has been answered. A change that can't be carried out changes nothing, in
no replica: what was carried out last is written down, and a replica that starts later falls back to it.

Of a changed file only ``models`` and ``default`` are taken; all else is that of the server's start.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from medray.bundle.files import check_files, locate
from medray.bundle.read import Bundle
from medray.bundle.spec import MANIFEST_NAME
from medray.config.serving import ModelEntry, ServeConfig, load_serving
from medray.data.fingerprint import Fingerprint
from medray.data.writers.atomic import appearing
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import BundleError, MedrayError
from medray.predict.predictor import Floats, Predictor

Identity = tuple[str, str, str, str]
ACCEPTED = "accepted.json"
"""In the state folder: models and default as they were last carried out."""
_FOLLOWED = ("models", "default")
_FINGERPRINT = "fingerprint.json"
_MOST_FILES = 10_000


class Batcher(Protocol):
    """An engine behind a queue; see :mod:`medray.engines.ray.serve.batching`."""

    engine: Predictor

    def __call__(self, array: Floats) -> Floats: ...

    async def infer(self, array: Floats) -> Floats: ...

    def close(self) -> None: ...


@dataclass
class Version:
    """One version of a model, ready.

    Attributes:
        identity: of what it was opened from: folder, hash of its bundle.json, runtime, precision.
        about: model, engine, precision and fallback_reason, as every answer has them.
    """

    model: str
    version: str
    share: float
    identity: Identity
    bundle: Bundle
    fingerprint: Fingerprint | None
    batcher: Batcher
    about: dict[str, Any]
    _users: int = 0
    _retired: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _twin: nn.Module | None = None
    _twin_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The engine's, as a predictor has it."""
        return self.batcher.engine.name

    @property
    def precision(self) -> str:
        """The engine's, as a predictor has it."""
        return self.batcher.engine.precision

    def __call__(self, batch: Floats) -> Floats:
        """(B, C, *s) to logits, together with whatever else waits: a predictor for the bundle."""
        return self.batcher(batch)

    @contextlib.contextmanager
    def twin(self) -> Iterator[nn.Module]:
        """The torch network, built with the first use; for one thread at a time.

        Raises:
            RefusedError: 503, the bundle's files are no longer those that it was opened with.
        """
        with self._twin_lock:
            if self._twin is None:
                self._twin = self._load_twin()
            yield self._twin

    def _load_twin(self) -> nn.Module:
        directory, spec = self.bundle.directory, self.bundle.spec
        try:
            check_files(directory, spec)
            twin = self.bundle.model()
            check_files(directory, spec)  # nor were they changed while they were read
        except (BundleError, OSError) as error:
            raise RefusedError(
                503, "no-twin", "the bundle's files have changed since it was opened; try again", retry_after=10
            ) from error
        return twin

    def acquire(self) -> bool:
        """Keep it open for one request; False where it is being closed already."""
        with self._lock:
            if self._retired:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """The request is answered."""
        with self._lock:
            self._users -= 1
            over = self._retired and not self._users
        if over:
            self.batcher.close()

    def retire(self) -> None:
        """Close it, once nobody uses it."""
        with self._lock:
            self._retired = True
            over = not self._users
        if over:
            self.batcher.close()


Table = Mapping[str, Mapping[str, Version]]
MakeBatcher = Callable[[str, str, Predictor], Batcher]


class Fleet:
    """Every version that this replica answers with.

    Args:
        config: of the server's start.
        path: of the configuration file to follow; None: there is none. It may have changed since the start: what it
            says of the models counts, or, where it is refused, what was carried out last.
        threads: of each engine.
        make_batcher: puts a queue before an engine; called with the model's name, the version and the engine.
        ready: told of each version that was opened.

    Raises:
        MedrayError: a bundle can't be used here.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        path: Path | None,
        threads: int,
        make_batcher: MakeBatcher,
        ready: Callable[[Version], None] = lambda _: None,
    ) -> None:
        self._path, self._threads, self._make_batcher, self._ready = path, threads, make_batcher, ready
        self.config = self._wanted = config
        self.error: str | None = None
        """Why the last change was refused; None where there was none, or it was carried out."""
        self._changing = threading.Lock()
        self._seen: dict[str, Any] = {}
        self._table: Table = {}
        self._table = self._start()

    @property
    def table(self) -> Table:
        """Versions by model's name and version."""
        return self._table

    @contextlib.contextmanager
    def chosen(self, model: str | None, version: str | None, key: str) -> Iterator[Version]:
        """The version that answers a request, kept open meanwhile.

        Args:
            model: named by the client; None for the default.
            version: likewise; None lets the shares decide.
            key: hash, in hexadecimal, of what is asked: equal requests get the same version.

        Raises:
            RefusedError: 400 or 404, there is no such model or version.
        """
        found = self._choose(model, version, key)
        while not found.acquire():  # it was replaced this very moment
            found = self._choose(model, version, key)
        try:
            yield found
        finally:
            found.release()

    def _choose(self, model: str | None, version: str | None, key: str) -> Version:
        table = self._table
        name = model or self.config.default_model
        if name is None:
            raise RefusedError(400, "no-model", f"name a model with ?model=, one of: {', '.join(table)}")
        if not table:
            raise RefusedError(503, "closing", "this server is closing; try again", retry_after=1)
        if name not in table:
            raise RefusedError(404, "no-model", f"there is no such model; there are: {', '.join(table)}")
        versions = table[name]
        if version is not None:
            if version not in versions:
                raise RefusedError(404, "no-version", f"{name} has no such version; it has: {', '.join(versions)}")
            return versions[version]
        place = int(key[:12], 16) / 16**12 * sum(one.share for one in versions.values())
        for one in versions.values():
            place -= one.share
            if place < 0:
                return one
        return max(versions.values(), key=lambda one: one.share)  # rounding

    def follow(self) -> bool:
        """Look whether the configuration or a bundle has changed, and carry it out; whether anything was changed.

        Called over and over, from a thread; never raises.
        """
        if self._stamps() == self._seen:
            return False
        with self._changing:
            try:
                config = self._load()
                table = self._build(config)
            except Exception as error:
                self.error = _reason(error)
                return False
            self._keep(config)
            changed = config != self.config or any(
                self._table.get(one.model, {}).get(one.version) is not one for one in _all(table)
            )
            former, self._table, self.config, self.error = self._table, table, config, None
            for name, entry in config.models.items():
                for version, wanted in entry.versions.items():
                    table[name][version].share = wanted.share
            kept = {id(one) for one in _all(table)}
            for one in _all(former):
                if id(one) not in kept:
                    one.retire()
            return changed

    def close(self) -> None:
        """Retire all."""
        former, self._table = self._table, {}
        for one in _all(former):
            one.retire()

    def _start(self) -> Table:
        """What the file says; or, where that is refused, what was carried out last, or stood at the start."""
        first: Exception | None = None
        tried: list[ServeConfig] = []
        for get in (self._load,) if self._path is None else (self._load, self._accepted, lambda: self.config):
            try:
                config = get()
                if config in tried:
                    continue
                tried.append(config)
                table = self._build(config)
            except Exception as error:
                first = first or error
                continue
            if first is None:
                self._keep(config)
            else:
                self.error = _reason(first)
            self.config = config
            return table
        assert first is not None
        raise first

    def _load(self) -> ServeConfig:
        """What is wanted now, by the file; what was looked at for it is noted."""
        if self._path is None:
            self._seen = self._stamps()
            return self.config
        stamp = _stamp(self._path)
        self._seen = {**self._stamps(), str(self._path): stamp}  # also where the file can't be read
        told = load_serving(self._path)
        self._wanted = self.config.model_copy(update={name: getattr(told, name) for name in _FOLLOWED})
        self._seen = {**self._stamps(), str(self._path): stamp}
        return self._wanted

    def _accepted(self) -> ServeConfig:
        """What was carried out last.

        Raises:
            OSError, ValueError: there is no such note.
        """
        content = json.loads((Path(self.config.state) / ACCEPTED).read_bytes())
        start = self.config.model_dump(mode="json")
        return ServeConfig.model_validate(start | {name: content[name] for name in _FOLLOWED})

    def _keep(self, config: ServeConfig) -> None:
        """Note what was carried out, for replicas that start later; where that fails, they have the former note."""
        if self._path is None:
            return
        content = {name: config.model_dump(mode="json")[name] for name in _FOLLOWED}
        with contextlib.suppress(OSError), appearing(Path(config.state) / ACCEPTED) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def _build(self, config: ServeConfig) -> Table:
        """Every version of a configuration; those that are open already are taken over."""
        fresh: list[Version] = []
        table: dict[str, dict[str, Version]] = {}
        try:
            for name, entry in config.models.items():
                table[name] = {}
                for version, wanted in entry.versions.items():
                    identity = self._identity(entry, wanted.bundle)
                    open_already = self._table.get(name, {}).get(version)
                    if open_already is not None and open_already.identity == identity:
                        table[name][version] = open_already
                    else:
                        made = self._open(name, version, entry, wanted.bundle, wanted.share, identity)
                        fresh.append(made)
                        table[name][version] = made
        except BaseException:
            for one in fresh:
                one.retire()
            raise
        for one in fresh:
            self._ready(one)
        return table

    def _identity(self, entry: ModelEntry, directory: str) -> Identity:
        try:
            digest = hashlib.sha256((Path(directory) / MANIFEST_NAME).read_bytes()).hexdigest()
        except OSError:
            digest = ""  # opening it will say what is wrong
        return directory, digest, entry.runtime, entry.precision or ""

    def _open(
        self, model: str, version: str, entry: ModelEntry, directory: str, share: float, identity: Identity
    ) -> Version:
        bundle = Bundle.open(directory)
        selected = bundle.select(entry.runtime, precision=entry.precision, threads=self._threads)
        engine = bundle.predictor(entry.runtime, precision=entry.precision, threads=self._threads)
        fingerprint = None
        if _FINGERPRINT in bundle.spec.files:
            fingerprint = Fingerprint.load(locate(bundle.directory, _FINGERPRINT))
        about = {
            "model": {"name": model, "version": version, "bundle": bundle.spec.name, "created": bundle.spec.created},
            "engine": engine.name,
            "precision": engine.precision,
            "fallback_reason": selected.fallback_reason,
        }
        return Version(
            model=model,
            version=version,
            share=share,
            identity=identity,
            bundle=bundle,
            fingerprint=fingerprint,
            batcher=self._make_batcher(model, version, engine),
            about=about,
        )

    def _stamps(self) -> dict[str, Any]:
        """Of the file, and of all files of the wanted bundles: a copy under way is taken once it is whole."""
        paths = [] if self._path is None else [self._path]
        for folder in _folders(self._wanted):
            paths.append(Path(folder) / MANIFEST_NAME)
            with contextlib.suppress(OSError):  # it changes as we look: the next look will see
                paths += itertools.islice(Path(folder).rglob("*"), _MOST_FILES)
        return {str(path): _stamp(path) for path in paths}


def _all(table: Table) -> list[Version]:
    return [one for versions in table.values() for one in versions.values()]


def _folders(config: ServeConfig) -> set[str]:
    return {one.bundle for entry in config.models.values() for one in entry.versions.values()}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, MedrayError) else f"{type(error).__name__}: {error}"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
