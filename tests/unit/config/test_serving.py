"""The server's configuration: what it refuses, and where its paths start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medray.config.serving import check_serving, load_serving
from medray.errors import ConfigError

MODELS = {"seg": {"versions": {"1": {"bundle": "runs/seg/bundle"}}}}


def check(**keys: Any) -> Any:
    return check_serving({"models": MODELS, **keys}, source="here", folder=Path("/srv"))


def test_defaults_are_loopback_and_the_only_model() -> None:
    config = check()
    assert (config.host, config.port, config.default_model) == ("127.0.0.1", 8000, "seg")
    assert config.models["seg"].versions["1"].bundle == "/srv/runs/seg/bundle" and config.state == "/srv/runs/serve"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"prot": 1}, "prot"),
        ({"limits": {"body": 1}}, "limits.body"),
        ({"replicas": {"least": 3, "most": 2}}, "least=3"),
        ({"replicas": {"least": 0}}, "replicas.least"),
        ({"grpc_port": 8000}, "port of HTTP"),
        ({"host": "0.0.0.0"}, "medray keys add"),
        ({"host": "::"}, "medray keys add"),
        ({"default": "cls"}, "none of the models"),
        ({"models": {"seg": {"versions": {"1": {"bundle": "b", "share": 0}}}}}, "share 0"),
        ({"models": {"a/b": MODELS["seg"]}}, "models"),
        ({"security": {"certificate": "c.pem"}}, "belong together"),
        ({"models": {}}, "models"),
    ],
)
def test_what_is_wrong_is_named(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what.replace(".", r"\.")):
        check(**keys)


def test_beyond_loopback_with_keys(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"models": MODELS, "host": "0.0.0.0", "security": {"keys": "keys.json"}}))
    assert load_serving(path).security.keys == str(tmp_path / "keys.json")
