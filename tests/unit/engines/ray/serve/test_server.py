"""What a server refuses before it touches anything, and what it leaves to others."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from medray.config.serving import check_serving
from medray.engines.ray.serve import server
from medray.engines.ray.serve.replica import build
from medray.errors import ConfigError, ServingError

MODELS = {"seg": {"versions": {"1": {"bundle": "b"}}}}


def test_a_taken_port_leaves_the_folder_of_its_server_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "state/metrics").mkdir(parents=True)
    (tmp_path / "state/metrics/counter.db").write_text("")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        content = {"models": MODELS, "state": "state", "port": other.getsockname()[1]}
        config = check_serving(content, source="test", folder=tmp_path)
        with pytest.raises(ServingError, match="can't listen"), server.serving(config, None):
            pass
    assert (tmp_path / "state/metrics/counter.db").exists()


def test_a_cluster_is_not_served_without_keys(tmp_path: Path) -> None:
    config = check_serving({"models": MODELS, "state": "state"}, source="test", folder=tmp_path)
    with pytest.raises(ServingError, match="medray keys add"), server.serving(config, None, address="auto"):
        pass
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"models": MODELS}))
    with pytest.raises(ConfigError, match="medray keys add"):
        build({"config": str(tmp_path / "serve.yaml")})


@pytest.mark.parametrize(("local", "done"), [(True, ["all"]), (False, ["medray"])])
def test_on_a_cluster_our_application_alone_is_ended(monkeypatch: Any, local: bool, done: list[str]) -> None:
    from ray import serve

    ended: list[str] = []
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append("all"))
    monkeypatch.setattr(serve, "delete", ended.append)
    server._end(local=local)
    assert ended == done
