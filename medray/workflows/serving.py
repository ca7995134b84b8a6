"""Serve bundles over HTTP: ``medray serve``; and the keys of those who may ask: ``medray keys``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medray import logs
from medray.bundle.files import sha256
from medray.bundle.spec import MANIFEST_NAME
from medray.config.serving import ServeConfig, check_serving, load_serving
from medray.data.writers.atomic import appearing
from medray.errors import ServingError
from medray.tracking import registered

REGISTERED = "models:/"
_REGISTERED = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>[1-9][0-9]{0,8}))")
FILE = "serve.yaml"
LOCK = "lock"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to serve by.

    Attributes:
        config: checked.
        path: of its file.
        text: to be written there; None: the file is the user's own.
    """

    config: ServeConfig
    path: Path
    text: str | None

    def write(self) -> None:
        """Write what isn't the user's own."""
        if self.text is not None:
            with appearing(self.path) as partial:
                partial.write_text(self.text, encoding="utf-8")


def serve(
    what: Sequence[str],
    *,
    changes: dict[str, Any],
    runtime: str | None = None,
    address: str | None = None,
    registry: Path = Path("runs"),
    note: Callable[[str], None] = lambda _: None,
    started: Callable[[str, Path], None] = lambda _url, _path: None,
    until: threading.Event | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        what: one configuration file; or bundles, for which one is written into the state folder. A bundle is a folder,
            or ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` of the registry.
        changes: keys of the configuration that the command line sets; only beside bundles.
        runtime: of the bundles; None for the configuration's default.
        address: of a Ray cluster; None for this machine.
        registry: folder that holds ``mlflow.db``.
        note: told which version a name of the registry stands for, and where gRPC is answered.
        started: told the URL, and the file that the server follows.
        until: ends it as well.

    Raises:
        ServingError: neither a file nor bundles, another server uses the state folder, or the server doesn't come up.
        StorageError: a name that the registry doesn't have.
        ConfigError: a configuration that the schema refuses.
    """
    wanted = configuration(what, changes, runtime, registry=registry, note=note)
    config, path = wanted.config, wanted.path
    over = until or threading.Event()
    from medray.engines.ray.serve.server import serving

    with (
        _ended_by_signals(over),
        alone(Path(config.state)),
        logs.recording(Path(config.state), run="serve"),
        _written(wanted),
        serving(config, path, address=address) as url,
        _ended_by_signals(over),  # again: Ray, as it starts, puts a handler of its own in place that ends at once
    ):
        if config.grpc_port is not None:
            note(f"gRPC at {config.host}:{config.grpc_port}")
        started(url, path)
        over.wait()


@contextlib.contextmanager
def _written(wanted: Wanted) -> Iterator[None]:
    wanted.write()
    yield


@contextlib.contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold the state folder, which is made, for one server; a process that dies lets go of it.

    Raises:
        ServingError: another server has it, or it can't be written.
    """
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServingError(
            f"{state}: can't be written ({error.strerror or error}). Set state: another folder"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServingError(f"{state}: another server uses this folder; set state to another one") from None
        except OSError as error:
            raise ServingError(
                f"{state}: can't be locked ({error.strerror or error}). Set state: another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)


def configuration(
    what: Sequence[str],
    changes: dict[str, Any],
    runtime: str | None = None,
    *,
    registry: Path = Path("runs"),
    note: Callable[[str], None] = lambda _: None,
) -> Wanted:
    """What to serve by; made from bundles where they are named. Nothing is written yet.

    A name of the registry is looked up now, once: a model is never changed by an alias that moves.

    Raises:
        ServingError: neither a file nor bundles, a registered bundle was altered, or two versions of one are asked for.
        StorageError: a name that the registry doesn't have.
        ConfigError: the schema refuses something.
    """
    if len(what) == 1 and Path(what[0]).is_file():
        given = [*changes, *(["runtime"] if runtime else [])]
        if given:
            raise ServingError(f"{what[0]} is a configuration: write {', '.join(given)} into it")
        path = Path(what[0]).absolute()
        return Wanted(config=load_serving(path), path=path, text=None)
    models: dict[str, Any] = {}
    own: set[str] = set()  # of the registry
    for text in what:
        if text.startswith(REGISTERED):
            name, version, place = _registered(text, registry, note)
            if name in own:
                raise ServingError(
                    f"{text}: {name} is named twice. Serve one version of it, or write a configuration with both under "
                    f"models.{name}.versions, each with its share"
                )
            own.add(name)
        else:
            place, version = Path(text).absolute(), "1"
            name = place.parent.name if place.name == "bundle" else place.name
        if not (place / MANIFEST_NAME).is_file():
            raise ServingError(
                f"{text}: neither a bundle (a folder with {MANIFEST_NAME}) nor a configuration file such as "
                "serve/serve.yaml"
            )
        unique, number = name, 2
        while unique in models:
            unique, number = f"{name}-{number}", number + 1
        models[unique] = {"versions": {version: {"bundle": str(place)}}, **({"runtime": runtime} if runtime else {})}
    here = Path.cwd()
    content = {**changes, "models": models}
    config = check_serving(content, source="the command line", folder=here)
    content["state"] = config.state
    if config.security.keys is not None:
        content["security"] = {**content["security"], "keys": config.security.keys}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return Wanted(config=config, path=Path(config.state) / FILE, text=text)


def _registered(text: str, registry: Path, note: Callable[[str], None]) -> tuple[str, str, Path]:
    """Name, version and folder that a name of the registry stands for now."""
    parts = _REGISTERED.fullmatch(text)
    if parts is None:
        raise ServingError(f"{text}: a registered model reads models:/NAME@champion, or models:/NAME/3 for a version")
    found = registered(registry, parts["name"], alias=parts["alias"], version=parts["version"])
    manifest = found.folder / MANIFEST_NAME
    if not manifest.is_file() or sha256(manifest) != found.digest:
        raise ServingError(
            f"{text}: {found.folder} is not the bundle that was registered as version {found.version} (SHA-256 of "
            f"{MANIFEST_NAME} differs). Serve another version, or the study's own bundle"
        )
    note(f"{text} is version {found.version}, {found.folder}")
    return found.name, found.version, found.folder


@contextlib.contextmanager
def _ended_by_signals(over: threading.Event) -> Any:
    """Ctrl-C and SIGTERM end it in order: what was taken in is answered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: over.set())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def add_key(
    path: Path, name: str, scopes: Sequence[str], *, requests_per_minute: int | None = None, days: int | None = None
) -> str:
    """Add an API key to a file, which is made where there is none; the key, which is nowhere else.

    Raises:
        ServingError: an unknown scope, or the file can't be used.
    """
    from medray.engines.ray.serve import keys

    unknown = sorted(set(scopes) - set(keys.SCOPES))
    if unknown:
        raise ServingError(f"no scope {', '.join(unknown)}; there are {', '.join(keys.SCOPES)}")
    wanted = tuple(scope for scope in keys.SCOPES if scope in scopes)
    return keys.add_key(path, name, wanted, requests_per_minute=requests_per_minute, days=days)


def list_keys(path: Path) -> list[dict[str, Any]]:
    """What may be shown of a file's keys.

    Raises:
        ServingError: the file can't be used.
    """
    from medray.engines.ray.serve import keys

    return [keys.shown(key) for key in keys.load_keys(path)]


def revoke_key(path: Path, which: str) -> int:
    """Take back the key of this id, or all of this name; how many.

    Raises:
        ServingError: there is none, or the file can't be used.
    """
    from medray.engines.ray.serve import keys

    return keys.revoke_key(path, which)
