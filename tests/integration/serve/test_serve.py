"""A real server on Ray Serve, asked over HTTP."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest

import medray
from medray.bundle.read import Bundle
from medray.data.readers import read_image
from medray.errors import ServingError
from tests.unit.engines.ray.serve.samples import nifti_bytes, nii, npy, png, zipped


@pytest.fixture
def client(server: Any) -> medray.Client:
    return medray.Client(server.url, server.key, patience=60.0)


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def processes(server: Any) -> list[psutil.Process]:
    """The server's and all that it started, those of Ray that have left its tree among them."""
    own = psutil.Process(server.process.pid)
    session = {process.pid: process for process in [own, *own.children(recursive=True)]}
    mark = str(server.state)
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.environ().values()):
                session[process.pid] = process
        except (psutil.Error, OSError):
            continue
    return list(session.values())


def test_answers_are_those_of_the_bundle(server: Any, client: medray.Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    found = client.predict(tmp_path / "a.png")
    offline = Bundle.open(server.bundles["cls"]).predict(read_image("a.png", tmp_path))
    assert found["probabilities"]["ill"] == pytest.approx(float(offline.probabilities[1]), abs=1e-5)
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(nifti_bytes(nii()))
    mask = nib.load(client.save(scan, tmp_path / "mask.nii.gz", "nifti", model="seg"))
    whole = Bundle.open(server.bundles["seg"]).predict(read_image("scan.nii.gz", tmp_path))
    assert np.allclose(mask.affine, nib.load(scan).affine) and np.array_equal(np.asarray(mask.dataobj), whole.labels)


def test_triton_s_client_works_unmodified(server: Any) -> None:
    import tritonclient.http as triton

    headers = {"Authorization": f"Bearer {server.key}"}
    asking = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert asking.is_server_live() and asking.is_server_ready() and asking.is_model_ready("cls", "1")
    assert asking.get_model_metadata("cls", headers=headers)["inputs"][0]["shape"] == [-1, 1, 16, 16]
    array = np.random.default_rng(0).normal(size=(3, 1, 16, 16)).astype(np.float32)
    expected = Bundle.open(server.bundles["cls"]).predictor()(array)
    for binary in (True, False):
        tensor = triton.InferInput("image", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array, binary_data=binary)
        wanted = [triton.InferRequestedOutput("logits", binary_data=binary)]
        # Its own copy: the client writes into the headers that it is given.
        answer = asking.infer("cls", [tensor], outputs=wanted, headers=dict(headers), request_id="7")
        assert np.allclose(answer.as_numpy("logits"), expected, atol=1e-4)
        assert answer.get_response()["id"] == "7"
    asking.close()


def test_triton_s_client_works_unmodified_over_grpc(server: Any) -> None:
    import tritonclient.grpc as triton

    headers = {"authorization": f"Bearer {server.key}"}
    asking = triton.InferenceServerClient(server.grpc)
    assert asking.is_server_live() and asking.is_server_ready() and asking.is_model_ready("cls", headers=headers)
    assert list(asking.get_model_metadata("cls", headers=headers).inputs[0].shape) == [-1, 1, 16, 16]
    array = np.random.default_rng(0).normal(size=(3, 1, 16, 16)).astype(np.float32)
    tensor = triton.InferInput("image", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    answer = asking.infer("cls", [tensor], headers=headers, request_id="7")
    assert np.allclose(answer.as_numpy("logits"), Bundle.open(server.bundles["cls"]).predictor()(array), atol=1e-4)
    assert answer.get_response().id == "7"
    with pytest.raises(triton.InferenceServerException, match="valid key"):
        asking.infer("cls", [tensor])
    asking.close()
    lines = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines if line["what"] == "infer"][-1] == "clinic"


def test_only_loopback_is_listened_on(server: Any) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port, process.name())
        for process in processes(server)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    ports = {int(address.rpartition(":")[2]) for address in (server.url, server.grpc)}
    assert ports <= {port for _, port, _ in listening}
    wide = [one for one in listening if not ipaddress.ip_address(one[0].removeprefix("::ffff:")).is_loopback]
    assert not wide, wide


def test_keys_and_scopes_hold_and_change_without_a_restart(server: Any, tmp_path: Path) -> None:
    from medray.engines.ray.serve.keys import add_key, revoke_key

    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ServingError, match="401"):
        medray.Client(server.url).predict(tmp_path / "a.png")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/metrics", headers={"X-API-Key": server.key}))
    path = server.path.parent / "keys.json"
    guest = medray.Client(server.url, add_key(path, "guest", ("predict",)), patience=0.0)

    def let_in() -> bool:
        try:
            return bool(guest.models())
        except ServingError:
            return False

    until(let_in)
    revoke_key(path, "guest")
    until(lambda: not let_in())


def test_requests_of_many_clients_run_together_while_health_is_green(server: Any, client: Any, tmp_path: Path) -> None:
    paths = []
    for n in range(12):
        paths.append(tmp_path / f"{n}.png")
        paths[-1].write_bytes(png(seed=n))
    slowest = 0.0
    with ThreadPoolExecutor(12) as pool:
        found = [pool.submit(client.predict, path, version="1") for path in paths * 4]
        while not all(one.done() for one in found):
            begin = time.monotonic()
            assert json.loads(server.get("/v2/health/ready"))["ready"]
            slowest = max(slowest, time.monotonic() - begin)
    assert all(one.result()["model"]["name"] == "cls" for one in found)
    text = server.get("/metrics").decode()
    runs = float(re.search(r'medray_batch_requests_count\{model="cls",version="1"\} (\S+)', text)[1])
    requests = float(re.search(r'medray_batch_requests_sum\{model="cls",version="1"\} (\S+)', text)[1])
    assert requests > 1.2 * runs


def test_a_swap_under_load_loses_no_request_and_rolls_back(server: Any, tmp_path: Path) -> None:
    client = medray.Client(server.url, server.key, patience=0.0)  # nothing is tried again: nothing may fail
    (tmp_path / "a.png").write_bytes(png())
    expected = {}
    for name in ("cls", "other"):
        offline = Bundle.open(server.bundles[name]).predict(read_image("a.png", tmp_path))
        expected[name] = float(offline.probabilities[1])
    over, seen, wrong = threading.Event(), Counter(), []

    def ask() -> None:
        while not over.is_set():
            try:
                found = client.predict(tmp_path / "a.png")
                version = found["model"]["version"]
                seen[version] += 1
                if abs(found["probabilities"]["ill"] - expected["cls" if version == "1" else "other"]) > 1e-4:
                    wrong.append(found)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: seen["1"] > 5)
        server.configure(v2=("other", 1.0))
        until(lambda: seen["2"] > 5)
        server.configure(v1=("cls", 1.0))
        back = seen["1"]
        until(lambda: seen["1"] > back + 5)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        server.configure(v1=("cls", 1.0))
    assert not wrong, wrong[:3]


def test_mutated_bodies_cost_no_more_than_a_refusal(server: Any) -> None:
    rng = random.Random(0)
    series = {"a.dcm": bytes(128) + b"DICM" + bytes(500)}
    zips = [zipped(series, method) for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)]
    zips.append(zipped(series, zipfile.ZIP_STORED, zip64=True))
    seeds = [png(), nifti_bytes(nii((6, 6, 6))), npy(np.zeros((8, 8))), *zips, b"{}"]
    statuses: Counter[int] = Counter()
    for n in range(200):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 8)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        if n % 4 == 0:
            del body[rng.randrange(len(body)) :]
        path = rng.choice(["/v1/predict", "/v1/predict?model=seg", "/v2/models/cls/infer"])
        headers = {
            "X-API-Key": server.key,
            "Content-Type": rng.choice(["", "image/png", "multipart/form-data; boundary=x"]),
        }
        request = urllib.request.Request(server.url + path, data=bytes(body), headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                statuses[answer.status] += 1
        except urllib.error.HTTPError as error:
            statuses[error.code] += 1
            assert error.code < 500, (path, error.code, error.read()[:300])
    assert statuses.total() == 200 and json.loads(server.get("/v2/health/ready"))["ready"]
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as broken:
        broken.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nab")
    assert json.loads(server.get("/v2/health/live"))["live"]


def test_a_killed_replica_is_replaced_and_the_client_has_its_answer(server: Any, client: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    before = client.predict(tmp_path / "a.png")
    names = {process: " ".join(process.cmdline()) for process in processes(server)}
    (replica,) = [process for process, name in names.items() if "ray::" in name and "Replica" in name]
    os.kill(replica.pid, signal.SIGKILL)
    patient = medray.Client(server.url, server.key, patience=150.0)
    after = patient.predict(tmp_path / "a.png")
    assert after["probabilities"] == before["probabilities"]
    lines = [json.loads(line) for line in (server.state / "audit.jsonl").read_text().splitlines()]
    assert all({"who", "input", "result", "model"} <= set(line) for line in lines)
