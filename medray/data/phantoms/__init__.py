"""Phantoms: parametric images with known masks and classes, so that everything runs with no download."""

from __future__ import annotations

from medray.data.phantoms.base import PhantomSpec, Scanner
from medray.data.phantoms.catalogue import PHANTOMS, phantom_manifest, read_phantom
from medray.data.phantoms.files import write_phantom

__all__ = ["PHANTOMS", "PhantomSpec", "Scanner", "phantom_manifest", "read_phantom", "write_phantom"]
