"""A service without Ray: three tiny bundles of real networks, written once, and the routes in front of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medray.config.serving import check_serving
from medray.engines.ray.serve.app import create_app
from medray.engines.ray.serve.batching import DirectBatcher
from medray.engines.ray.serve.meters import Meters
from medray.engines.ray.serve.service import Service
from tests.unit.engines.ray.serve.samples import write_small


@pytest.fixture(scope="session")
def small_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name: cls and other (two versions of one), seg (3-D), seg2d."""
    root = tmp_path_factory.mktemp("bundles")
    return {
        "cls": write_small(root / "cls"),
        "other": write_small(root / "other", seed=1),
        "seg": write_small(root / "seg", "segmentation", ndim=3),
        "seg2d": write_small(root / "seg2d", "segmentation"),
    }


def _service(bundles: dict[str, Path], folder: Path, path: Path | None = None, **keys: Any) -> Service:
    models = {"cls": {"runtime": "torch", "versions": {"1": {"bundle": str(bundles["cls"])}}}}
    content = {"state": str(folder / "state"), "models": models, **keys}
    config = check_serving(content, source="test", folder=folder)
    return Service(
        config,
        path=path,
        threads=1,
        make_batcher=lambda model, version, engine: DirectBatcher(engine, lambda *_: None),
        meters=Meters(),
    )


def _client(service: Service) -> Any:
    from starlette.testclient import TestClient

    client = TestClient(create_app(lambda: service), raise_server_exceptions=False)
    client.service = service
    return client


@pytest.fixture(scope="session")
def client(small_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of the routes, without a network, for all tests that change nothing: models cls, seg and seg2d."""
    models = {
        name: {"runtime": "torch", "versions": {"1": {"bundle": str(small_bundles[name])}}}
        for name in ("cls", "seg", "seg2d")
    }
    service = _service(small_bundles, tmp_path_factory.mktemp("shared"), default="cls", models=models)
    yield _client(service)
    service.close()


@pytest.fixture
def make_service(small_bundles: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """make_service(path, **keys of the configuration): the model cls, unless it says others."""
    made = []

    def make(path: Path | None = None, **keys: Any) -> Service:
        made.append(_service(small_bundles, tmp_path, path, **keys))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def make_client(make_service: Callable[..., Service]) -> Callable[..., Any]:
    """make_client(**keys of the configuration): a client of its own service."""
    return lambda service=None, **keys: _client(service or make_service(**keys))
