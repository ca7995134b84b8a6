"""Versions side by side, canaries, hot swap and roll-back, by changing the file alone."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from medray.engines.ray.serve.keys import add_key, revoke_key
from medray.engines.ray.serve.refusal import RefusedError
from medray.engines.ray.serve.replica import Replica
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


def test_a_copy_that_is_still_under_way_is_taken_once_it_is_whole(make_service, small_bundles, tmp_path) -> None:
    path, place = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 1)}), tmp_path / "copy"
    fleet = follow(path, make_service).fleet
    shutil.copytree(small_bundles["other"], place)
    weights = next(place.rglob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-7])
    write(path, {"2": (place, 1)})
    assert not fleet.follow() and "Copy the bundle again" in fleet.error
    weights.write_bytes(kept)  # bundle.json itself and the configuration stay as they are
    assert fleet.follow() and fleet.error is None and set(fleet.table["cls"]) == {"2"}


def test_a_replica_that_starts_later_takes_the_models_alone(make_service, small_bundles, tmp_path) -> None:
    path = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 1)}, limits={"waiting": 3})
    start = yaml.safe_load(path.read_text())
    service = make_service(path, **start)
    write(path, {"2": (small_bundles["other"], 1)}, limits={"waiting": 9}, default="cls")
    service.refresh()
    later = make_service(path, **start)
    for one in (service, later):
        config = one.fleet.config
        assert set(one.fleet.table["cls"]) == {"2"} and config.default == "cls" and config.limits.waiting == 3
        assert one.predictions._most == 3


def test_a_refused_file_changes_nothing_in_a_replica_that_starts_later(make_service, small_bundles, tmp_path) -> None:
    path = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 1)})
    start = yaml.safe_load(path.read_text())
    service = make_service(path, **start)
    write(path, {"2": (small_bundles["other"], 1)})
    service.refresh()
    path.write_text("models: {cls: {verions: {}}}")
    service.refresh()
    later = make_service(path, **start)
    assert set(later.fleet.table["cls"]) == {"2"} and "verions" in later.fleet.error
    write(path, {"3": (tmp_path / "none", 1)})
    again = make_service(path, **start)
    assert set(again.fleet.table["cls"]) == {"2"} and again.fleet.error is not None
    (tmp_path / "state/accepted.json").unlink()
    assert set(make_service(path, **start).fleet.table["cls"]) == {"1"}  # nothing but the start is known
    write(path, {"3": (small_bundles["cls"], 1)})
    assert again.fleet.follow() and set(again.fleet.table["cls"]) == {"3"} and again.fleet.error is None


def test_a_twin_of_files_that_have_changed_is_not_built(make_service, make_client, small_bundles, tmp_path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(small_bundles["cls"], place)
    service = follow(write(tmp_path / "serve.yaml", {"1": (place, 1)}), make_service)
    weights = next(place.rglob("*.safetensors"))
    weights.write_bytes(next(small_bundles["other"].rglob("*.safetensors")).read_bytes())
    answer = make_client(service).post("/v1/explain", content=png())
    assert answer.status_code == 503 and answer.json()["error"]["reason"] == "no-twin"


def test_keys_are_looked_at_while_a_bundle_is_being_opened(make_service, small_bundles, tmp_path, monkeypatch) -> None:
    add_key(tmp_path / "keys.json", "old", ("predict",))
    keys = {"keys": str(tmp_path / "keys.json")}
    path = write(tmp_path / "serve.yaml", {"1": (small_bundles["cls"], 1)}, security=keys)
    service = follow(path, make_service)
    replica = Replica.__new__(Replica)
    replica.service, replica._over, free, opening = service, threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        opening.set()
        free.wait(20)

    monkeypatch.setattr(service, "refresh", slow)
    replica._start_to_follow()
    assert opening.wait(20)
    revoke_key(tmp_path / "keys.json", "old")
    until = time.monotonic() + 20
    while service.ring._keys and time.monotonic() < until:
        time.sleep(0.02)
    assert not service.ring._keys
    replica.check_health()
    service.audit.close()
    with pytest.raises(RuntimeError, match="audit"):
        replica.check_health()
    replica._over.set()
    free.set()
    asyncio.run(replica.__del__())
    monkeypatch.delattr(Replica, "__del__")  # awaited once


def test_a_replica_is_closed_away_from_its_loop(monkeypatch) -> None:
    replica, closed = Replica.__new__(Replica), []

    async def end() -> None:
        loop = asyncio.get_running_loop()

        def close() -> None:  # what is under way needs the loop to come to its end
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(5)
            closed.append(True)

        replica.service = SimpleNamespace(close=close)
        await replica.__del__()

    asyncio.run(end())
    monkeypatch.delattr(Replica, "__del__")
    assert closed


def test_a_broken_bundle_does_not_start(make_service, small_bundles, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_bundles["cls"], broken)
    next(broken.rglob("*.safetensors")).unlink()
    with pytest.raises(BundleError):
        follow(write(tmp_path / "serve.yaml", {"1": (broken, 1)}), make_service)
