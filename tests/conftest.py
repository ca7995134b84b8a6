"""Fixtures that tests of several packages share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch, NumPy or Ray: tests are tiny, and threads that wait for each other make them slow.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_labels() -> Iterator[None]:
    """What a worker's function binds for all lines of its process must not stand on those of the next test."""
    from medray import logs

    before = dict(logs._labels)
    yield
    logs._labels.clear()
    logs._labels.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real medical data beside the checkout; without it the tests that need it skip.

    ``MEDRAY_SHARED_DATA`` names another place.
    """
    folder = Path(os.environ.get("MEDRAY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data: {folder} is not there (MEDRAY_SHARED_DATA names another place)")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one: starting it costs seconds."""
    from medray.engines.ray.session import ray_session as start

    with start(cpus=2):
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT
