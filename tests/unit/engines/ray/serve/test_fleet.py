"""Versions side by side, canaries, hot swap and roll-back, by changing the file alone."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from medray.engines.ray.serve.refusal import RefusedError
from medray.errors import BundleError
from tests.unit.engines.ray.serve.samples import png


def write(path: Path, bundles: dict[str, Any], **keys: Any) -> Path:
    versions = {name: {"bundle": str(place), "share": share} for name, (place, share) in bundles.items()}
    state = str(path.parent / "state")
    content = {"state": state, "models": {"cls": {"runtime": "torch", "versions": versions}}, **keys}
    path.write_text(yaml.safe_dump(content))
    return path


def follow(path: Path, make_service: Any) -> Any:
    content = yaml.safe_load(path.read_text())
    return make_service(path, **content)


def test_shares_decide_and_equal_requests_get_the_same_version(make_service, small_bundles, tmp_path) -> None:
    path = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 0.8), "2": (small_bundles["other"], 0.2)})
    fleet = follow(path, make_service).fleet
    seen: Counter[str] = Counter()
    for n in range(500):
        key = hashlib.sha256(str(n).encode()).hexdigest()
        with fleet.chosen(None, None, key) as one, fleet.chosen("cls", None, key) as again:
            assert one is again
            seen[one.version] += 1
    assert 60 < seen["2"] < 140
    with fleet.chosen("cls", "2", "0" * 12) as one:
        assert one.version == "2"
    for model, version in (("x", None), ("cls", "9")):
        with pytest.raises(RefusedError) as refused, fleet.chosen(model, version, "0" * 12):
            pass
        assert refused.value.status == 404


def test_a_swap_under_way_loses_no_request(make_service, make_client, small_bundles, tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 1)})
    service = follow(path, make_service)
    client, old = make_client(service), service.fleet.table["cls"]["1"]
    engine, started, free = old.batcher.engine, threading.Event(), threading.Event()

    class Slow:
        name, precision = engine.name, engine.precision

        def __call__(self, array: Any) -> Any:
            started.set()
            free.wait(20)
            return engine(array)

    monkeypatch.setattr(old.batcher, "engine", Slow())
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client.post("/v1/predict", content=png())))
    thread.start()
    assert started.wait(20)
    write(path, {"2": (small_bundles["other"], 1)})
    service.refresh()
    assert client.post("/v1/predict", content=png()).json()["model"]["version"] == "2"
    free.set()
    thread.join(20)
    assert answers[0].status_code == 200 and answers[0].json()["model"]["version"] == "1"
    write(path, {"1": (small_bundles["cls"], 1)})  # roll-back: the former line again
    service.refresh()
    assert client.post("/v1/predict", content=png()).json()["model"]["version"] == "1"


def test_a_change_that_can_not_be_carried_out_changes_nothing(make_service, make_client, small_bundles, tmp_path):
    path = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 1)})
    service = follow(path, make_service)
    client, before = make_client(service), service.fleet.table["cls"]["1"]
    broken = tmp_path / "broken"
    shutil.copytree(small_bundles["other"], broken)
    weights = next(broken.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    write(path, {"1": (small_bundles["cls"], 1), "2": (broken, 1)})
    service.refresh()
    assert service.fleet.table["cls"] == {"1": before}
    assert "Copy the bundle again" in client.get("/v1/status").json()["config_error"]
    path.write_text("models: {cls: {verions: {}}}")
    service.refresh()
    assert "verions" in client.get("/v1/status").json()["config_error"]
    assert client.post("/v1/predict", content=png()).status_code == 200
    write(path, {"1": (small_bundles["cls"], 1)})
    service.refresh()
    assert client.get("/v1/status").json()["config_error"] is None
    assert service.fleet.table["cls"]["1"] is before  # what did not change was not opened again


def test_a_bundle_written_anew_in_its_place_is_taken(make_service, small_bundles, tmp_path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(small_bundles["cls"], place)
    path = write(tmp_path / "serve.yaml", {"1": (place, 1)})
    service = follow(path, make_service)
    before = service.fleet.table["cls"]["1"]
    place.rename(tmp_path / "old")
    shutil.copytree(small_bundles["other"], place)
    assert service.fleet.follow() and service.fleet.table["cls"]["1"] is not before
    assert not service.fleet.follow()


def test_a_broken_bundle_does_not_start(make_service, small_bundles, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_bundles["cls"], broken)
    next(broken.rglob("*.safetensors")).unlink()
    with pytest.raises(BundleError):
        follow(write(tmp_path / "serve.yaml", {"1": (broken, 1)}), make_service)
