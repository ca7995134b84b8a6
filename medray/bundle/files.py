"""Files of a bundle, read without trust."""

from __future__ import annotations

import hashlib
from pathlib import Path

from medray.bundle.spec import BundleSpec
from medray.errors import BundleError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(directory: Path, name: str) -> Path:
    """The file ``name`` of a bundle, as long as it truly lies inside.

    Raises:
        BundleError: it is missing, no regular file, or leads out of the bundle (a link).
    """
    root = directory.resolve()
    path = root / name
    if path.resolve() != path:
        raise BundleError(f"{path}: leads out of its place by a link. A bundle holds its files itself")
    if not path.is_file():
        raise BundleError(f"{path}: missing. Copy the bundle again, whole")
    return path


def check_files(directory: Path, spec: BundleSpec) -> None:
    """Hold every named file against its size, then its hash.

    Raises:
        BundleError: a needed file isn't named, or one is missing, outside, or altered.
    """
    for needed in spec.weight_files:
        if needed not in spec.files:
            raise BundleError(f"{directory}: bundle.json does not name {needed}. Write the bundle anew")
    for name, entry in spec.files.items():
        path = locate(directory, name)
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(
                f"{path}: {size} bytes where bundle.json says {entry.bytes}. Copy the bundle again, whole"
            )
        if sha256(path) != entry.sha256:
            raise BundleError(f"{path}: altered since the bundle was written (SHA-256 differs). Copy the bundle again")
