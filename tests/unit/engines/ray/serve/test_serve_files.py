"""The files in serve/ fit what they are for."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from medray.config.serving import load_serving
from medray.engines.ray.serve.meters import Meters
from medray.engines.ray.serve.replica import build
from medray.errors import ConfigError


def require_ray_s_schema(content: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(content)
    # Ray takes unknown keys in silence: each of ours must be one of its own.
    assert set(content) <= set(ServeDeploySchema.model_fields)
    (application,) = schema.applications
    assert set(content["applications"][0]) <= set(type(application).model_fields)
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build


@pytest.fixture
def folder(repository: Path) -> Path:
    return repository / "serve"


def test_the_server_s_own_file(folder: Path) -> None:
    config = load_serving(folder / "serve.yaml")
    assert config.default_model == "seg" and config.security.keys is None


def test_ray_s_file_has_its_schema_and_names_what_is_there(folder: Path) -> None:
    require_ray_s_schema(yaml.safe_load((folder / "config.yaml").read_text()))
    with pytest.raises(ConfigError, match="confg"):
        build({"confg": "x"})


def test_kubernetes_manifest_holds_together(folder: Path) -> None:
    import ray

    manifest = yaml.safe_load((folder / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    inner = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    require_ray_s_schema(inner)
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    place = inner["applications"][0]["args"]["config"]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert any(place.startswith(f"{path}/") for path in mounted.values())
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    assert not re.search(r"token: *[^,}\s]{16}", (folder / "kuberay.yaml").read_text())  # no secret in the file


def test_the_board_asks_for_metrics_that_there_are(folder: Path) -> None:
    board = json.loads((folder / "grafana.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"medray_\w+", target["expr"])
    }
    kinds = {one.name for one in Meters()._registry.collect()}
    offered = {f"{name}{end}" for name in kinds for end in ("", "_total", "_bucket", "_sum", "_count")}
    assert len(asked) >= 9 and asked <= offered


def test_prometheus_asks_where_the_server_answers(folder: Path) -> None:
    (job,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
