"""The models in one replica: opened, checked, shared out, and changed while requests run.

The configuration file is the desired state. When it changes, or a bundle in its place is written anew, what is new is
opened and has to reproduce its golden outputs beside what answers meanwhile; then one assignment puts it in place. What
is no longer wanted goes when its last request has been answered. A change that can't be carried out changes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from medray.bundle.files import locate
from medray.bundle.read import Bundle
from medray.bundle.spec import MANIFEST_NAME
from medray.config.serving import ModelEntry, ServeConfig, load_serving
from medray.data.fingerprint import Fingerprint
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import MedrayError
from medray.predict.predictor import Floats, Predictor

Identity = tuple[str, str, str, str]
_FINGERPRINT = "fingerprint.json"


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
        """The torch network, built with the first use; for one thread at a time."""
        with self._twin_lock:
            if self._twin is None:
                self._twin = self.bundle.model()
            yield self._twin

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
        config: where it starts from.
        path: of the configuration file to follow; None: there is none.
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
        self.config = config
        self.error: str | None = None
        """Why the last change was refused; None where there was none, or it was carried out."""
        self._changing = threading.Lock()
        self._seen = self._stamps()
        self._table: Table = {}
        self._table = self._build(config)

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
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        with self._changing:
            self._seen = stamps
            try:
                config = self.config if self._path is None else load_serving(self._path)
                table = self._build(config)
            except MedrayError as error:
                self.error = str(error)
                return False
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"
                return False
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

    def _stamps(self) -> tuple[Any, ...]:
        paths = [] if self._path is None else [self._path]
        for entry in self.config.models.values():
            paths += [Path(one.bundle) / MANIFEST_NAME for one in entry.versions.values()]
        return tuple(_stamp(path) for path in paths)


def _all(table: Table) -> list[Version]:
    return [one for versions in table.values() for one in versions.values()]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
