"""API keys: hashed at rest, with scopes, changed while the server runs.

A key reads ``medray_ID_SECRET``. The file holds, of each, the id, scrypt's hash of the secret (RFC 7914), who has it
and what it may do. The server looks at the file again when it changes, so that a key is given, or taken back, within a
second.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from medray.config.serving import NAME
from medray.data.writers.atomic import appearing
from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import ServingError

Scope = Literal["predict", "explain", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = ("predict", "explain", "metrics", "admin")
_COST, _BLOCK, _PARALLEL = 2**14, 8, 1  # 16 MiB and some 40 ms a guess
_REMEMBERED = 1024
_MAX_BYTES = 4 << 20


class Key(BaseModel):
    """What the file says of one key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=NAME, description="who has it")
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    salt: str = Field(pattern=r"^[0-9a-f]{32}$")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1, le=1_000_000)
    expires: AwareDatetime | None = None


class KeyFile(BaseModel):
    """All of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[Key, ...] = Field((), max_length=10_000)


ANYONE = Key(id="0" * 12, name="anyone", scopes=SCOPES, salt="0" * 32, hash="0" * 64)
"""Who asks a server without keys."""


def _hash(secret: str, salt: str) -> str:
    derived = hashlib.scrypt(
        secret.encode(), salt=bytes.fromhex(salt), n=_COST, r=_BLOCK, p=_PARALLEL, maxmem=64 << 20, dklen=32
    )
    return derived.hex()


def load_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file.

    Raises:
        ServingError: missing, too large, or no such file.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ServingError(f"{path}: too large for a file of keys ({_MAX_BYTES:,} bytes at most)")
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        raise ServingError(f"{path}: no such file. Make it with: medray keys add NAME --file {path}") from None
    except OSError as error:
        raise ServingError(f"{path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ServingError(f"{path}: {where}: {first['msg']}. Make the file with: medray keys") from None


def add_key(
    path: Path,
    name: str,
    scopes: tuple[Scope, ...],
    *,
    requests_per_minute: int | None = None,
    days: int | None = None,
) -> str:
    """Add a key to a file, which is made if it isn't there; readable to its owner alone.

    Returns:
        The key itself, which is nowhere else.

    Raises:
        ServingError: the file can't be used, or a value is refused.
    """
    secret, identity, salt = secrets.token_urlsafe(32), secrets.token_hex(6), secrets.token_hex(16)
    expires = None if days is None else datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    try:
        key = Key(
            id=identity,
            name=name,
            scopes=scopes,
            salt=salt,
            hash=_hash(secret, salt),
            requests_per_minute=requests_per_minute,
            expires=expires,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ServingError(f"key {name!r}: {first['loc'][0]}: {first['msg']}") from None
    with _changing(path):
        _save(path, (*(load_keys(path) if path.exists() else ()), key))
    return f"medray_{identity}_{secret}"


def revoke_key(path: Path, which: str) -> int:
    """Take back the key with this id, or all of this name; how many there were.

    Raises:
        ServingError: there is none, or the file can't be used.
    """
    load_keys(path)  # a lock beside a file that isn't there would be a riddle
    with _changing(path):
        keys = load_keys(path)
        left = tuple(key for key in keys if which not in (key.id, key.name))
        if len(left) == len(keys):
            raise ServingError(f"{path}: no key {which!r}. List them with: medray keys list --file {path}")
        _save(path, left)
    return len(keys) - len(left)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One process at a time: of two that add a key at once, neither's is lost.

    The lock is a file of its own, since the file of keys is replaced with each change.

    Raises:
        ServingError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServingError(f"{path}: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise ServingError(f"{path}: {error.strerror or error}") from None
    finally:
        os.close(descriptor)


def _save(path: Path, keys: tuple[Key, ...]) -> None:
    with appearing(path) as partial:
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(KeyFile(keys=keys).model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


class KeyRing:
    """Who is asking? Thread-safe.

    Args:
        path: of the keys' file; None: anyone may ask.
        trouble: told, in one sentence without secrets, that a changed file was refused; the former keys stand.

    Raises:
        ServingError: the file can't be used.
    """

    def __init__(self, path: Path | None, trouble: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._trouble = path, trouble
        self._lock = threading.Lock()
        self._pepper = os.urandom(32)
        self._checked: dict[bytes, None] = {}  # right ones alone: guesses push nobody's out
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        if path is not None:
            self._keys, self._stamp = {key.id: key for key in load_keys(path)}, _stamp(path)

    def refresh(self) -> None:
        """Look whether the file has changed. A file that is gone or damaged leaves the former keys in force."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            keys = {key.id: key for key in load_keys(self._path)}
        except ServingError as error:
            self._trouble(str(error))
            return
        with self._lock:
            self._keys = keys
            self._checked.clear()

    @property
    def is_open(self) -> bool:
        """Whether anyone may ask."""
        return self._path is None

    def who(self, text: str | None, scope: Scope) -> Key:
        """The key behind what a client sent. The first look at a key takes some 40 ms of scrypt, the next none.

        Raises:
            RefusedError: 401 without a valid key, 403 where it may not do this.
        """
        if self.is_open:
            return ANYONE
        key = self._find(text) if text else None
        if key is None:
            raise RefusedError(401, "no-key", "send a valid key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        if key.expires is not None and key.expires < datetime.datetime.now(datetime.UTC):
            raise RefusedError(401, "expired-key", f"the key expired on {key.expires:%Y-%m-%d}; ask for a new one")
        if scope not in key.scopes:
            raise RefusedError(403, "no-scope", f"this key may {', '.join(key.scopes)}, not {scope}")
        return key

    def _find(self, text: str) -> Key | None:
        parts = text.split("_", 2)
        if len(text) > 200 or len(parts) != 3 or parts[0] != "medray":
            return None
        key = self._keys.get(parts[1])
        if key is None:
            return None
        mark = hmac.new(self._pepper, text.encode("utf-8", "replace"), "sha256").digest()
        with self._lock:
            known = mark in self._checked
        if not known:
            if not hmac.compare_digest(_hash(parts[2], key.salt), key.hash):
                return None
            with self._lock:
                while len(self._checked) >= _REMEMBERED:
                    self._checked.pop(next(iter(self._checked)))
                if self._keys.get(key.id) is key:  # taken back meanwhile?
                    self._checked[mark] = None
        return key if self._keys.get(key.id) is key else None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def from_headers(authorization: str | None, api_key: str | None) -> str | None:
    """The key in a request's headers: a bearer token, HTTP Basic's password, or X-API-Key."""
    if api_key:
        return api_key.strip()
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        return _basic(value)
    return None


def _basic(value: str) -> str | None:
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
    except (ValueError, UnicodeDecodeError):
        return None


def shown(key: Key) -> dict[str, Any]:
    """What may be shown of a key."""
    return key.model_dump(mode="json", exclude={"salt", "hash"})
