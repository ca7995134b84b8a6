"""Runs in a store that speaks S3: they go on from it when their disk is gone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.crash import NAME, SPACE, _alive, _family, _start, read_trials
from medray.errors import StorageError
from medray.workflows.events import StudyEvent
from medray.workflows.storage import RunStore
from medray.workflows.training import train_experiment

BUCKET = "hospital"
PATIENCE = 600.0
"""Seconds for each part, on a machine that is busy otherwise."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment that a user would set, and a bucket in it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "eu-central-1"}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    import boto3

    client = boto3.client("s3", endpoint_url=server, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/runs"


@pytest.mark.timeout(3 * PATIENCE)
def test_a_study_goes_on_from_the_store_on_another_disk(bucket: str, tmp_path: Path) -> None:
    """The driver gets SIGKILL with trials ended and others in flight, and its folder is deleted."""
    space = tmp_path / "space.yaml"
    space.write_text(SPACE.replace("EPOCHS", "6"), encoding="utf-8")
    first = tmp_path / "first"
    first.mkdir()
    asked = ["tune", str(space), f"study.name={NAME}", "study.trials=4", "study.concurrency=1", "--storage", bucket]
    process, log = _start(first, asked), first / "log.txt"
    deadline = time.monotonic() + PATIENCE
    while "trial 1 completed" not in log.read_text(encoding="utf-8"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.05)
    family = _family(process)
    process.kill()
    process.wait()
    for left in _alive(family):
        left.kill()
    psutil.wait_procs(family, timeout=20)
    told = read_trials(first / "runs" / NAME)
    assert told[0].is_finished and told[1].is_finished
    shutil.rmtree(first / "runs")

    second = tmp_path / "second"
    second.mkdir()
    process, log = _start(second, ["tune", "--resume", f"{bucket}/{NAME}"]), second / "log.txt"
    assert process.wait(PATIENCE) == 0, log.read_text(encoding="utf-8")
    found = read_trials(second / "runs" / NAME)
    assert sorted(found) == [0, 1, 2, 3] and all(row.is_finished for row in found.values())
    assert (found[0], found[1]) == (told[0], told[1]), "nothing that had ended is lost"
    for number, row in told.items():
        assert row.params in (None, found[number].params), "the same ids go on"
    again = log.read_text(encoding="utf-8")
    assert "trial 3 completed" in again and "trial 0" not in again and "trial 1 " not in again, again
    RunStore.at(f"{bucket}/{NAME}").fetch(tmp_path / "third")
    assert (tmp_path / "third" / "report.html").is_file() and (tmp_path / "third" / "bundle" / "bundle.json").is_file()


def test_a_training_goes_on_from_the_store_when_its_disk_is_gone(bucket: str, tmp_path: Path) -> None:
    out, store = tmp_path / "nodules", RunStore.at(f"{bucket}/nodules")
    words = [
        "data=phantom://xray-nodules?cases=40&size=32", "device=cpu", "model.name=small_cnn", "model.feature_size=8",
        "train.epochs=8", "train.batch_size=8", "train.validate_every=1",
    ]  # fmt: skip

    def lose_the_disk(event: StudyEvent) -> None:
        if event.text == "epoch 4":
            deadline = time.monotonic() + PATIENCE
            while "checkpoint.pt" not in (store._index() or ("", {}))[1]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            shutil.rmtree(out)

    with pytest.raises(Exception):  # noqa: B017  (whatever first misses its file)
        train_experiment(None, words, out=out, storage=bucket, observer=lose_the_disk)
    shutil.rmtree(out, ignore_errors=True)  # what the first one's last words made
    epochs: list[str] = []
    trained = train_experiment(
        None, words, out=out, storage=bucket, resume=True, observer=lambda event: epochs.append(event.text)
    )
    assert [row["epoch"] for row in trained.fit.history] == list(range(1, 9))
    assert "epoch 1" not in epochs and "epoch 8" in epochs, "it went on, and not from the beginning"
    store.fetch(tmp_path / "again")
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()


def test_a_store_that_cannot_be_is_found_before_anything_is_trained(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/runs/x can't be"):
        train_experiment(
            None,
            ["data=phantom://xray-nodules?cases=8&size=32"],
            out=tmp_path / "x",
            storage="s3://no-such-bucket/runs",
        )
    assert not (tmp_path / "x" / "fingerprint.json").exists()
