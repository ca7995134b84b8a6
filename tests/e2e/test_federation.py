"""A federation over a network by the command line alone: provision, server, sites, runs.

Four sites as processes, over TLS with node keys, on loopback: one takes part in runs that it knows alone, and one only
under secure aggregation.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

MEDRAY = [sys.executable, "-m", "medray"]
SITES = ("bonn", "jena", "kiel", "wien")
SECONDS = 400.0
SETTINGS = [
    "model.name=linear",
    "device=cpu",
    "train.batch_size=16",
    "federation.quorum=3",
    "federation.deadline=300",
]


def medray(*words: str, cwd: Path) -> str:
    done = subprocess.run([*MEDRAY, *words], cwd=cwd, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def running(words: Sequence[str], cwd: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen([*MEDRAY, *words], cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(log: Path, words: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while words not in log.read_text(encoding="utf-8", errors="replace"):
        assert process.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8", errors="replace")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def table(path: Path, seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    lines = ["patient,age,marker,label"]
    for row in range(rows):
        age, marker = rng.normal(60, 10), rng.normal()
        lines.append(f"p{row},{age:.2f},{marker:.3f},{int((age - 60) / 10 + 2 * marker + rng.normal(0, 0.3) > 0)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def moved_in(folder: Path, name: str, kit: Path, number: int) -> Path:
    """What a hospital does with its kit: unpack it, and write its rules."""
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(folder)
    own = folder / f"hearts-{name}"
    table(own / "cases.csv", seed=number, rows=40 + 10 * number)
    rules = yaml.safe_load((own / "site.yaml").read_text(encoding="utf-8"))
    rules |= {"data": f"{own / 'cases.csv'}?columns=age,marker", "fewest": 5, "cpus": 1}
    rules["privacy"] |= {"required": False, "share_fingerprint": True}
    rules["privacy"]["require_secure_aggregation"] = name == "kiel"
    if name == "wien":
        rules["allow"]["recipes"] = ["0" * 64]
    (own / "site.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    return own


def ended(run: Path) -> dict[str, object]:
    end = time.monotonic() + SECONDS
    while not (run / "outcome.json").is_file():
        log = (run / "run.log").read_text(encoding="utf-8") if (run / "run.log").is_file() else ""
        failed = (run / "failed.txt").read_text(encoding="utf-8") if (run / "failed.txt").is_file() else ""
        assert not failed and time.monotonic() < end, f"{failed}\n{log}"
        time.sleep(0.5)
    found: dict[str, object] = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    return found


def weights(run: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    [newest] = (run / "rounds").glob("*.safetensors")
    return {name: value for name, value in load_file(str(newest)).items() if name.startswith("weights/")}


@pytest.mark.timeout(1200)
def test_a_network_of_hospitals_by_the_command_line_alone(tmp_path: Path) -> None:
    port, admin = free_ports(2)
    invited = {"name": "hearts", "server": {"host": "127.0.0.1", "port": port}, "classes": ["0", "1"]}
    invited["sites"] = [{"name": name} for name in SITES]
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(invited), encoding="utf-8")
    medray("federate", "provision", "sites.yaml", cwd=tmp_path)
    kits = tmp_path / "federations" / "hearts" / "kits"
    homes = {name: moved_in(tmp_path, name, kits / f"{name}.zip", number) for number, name in enumerate(SITES)}
    serve = ["federate", "server", "federations/hearts", "--host", "127.0.0.1", "--admin-port", str(admin)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(serve, tmp_path, tmp_path / "server.log"))
        sites = {
            name: stack.enter_context(running(["federate", "site"], home, tmp_path / f"{name}.log"))
            for name, home in homes.items()
        }
        until(tmp_path / "server.log", "serving federation 'hearts'", server)
        for name, process in sites.items():
            until(tmp_path / f"{name}.log", "connected to", process)
        _runs(tmp_path)
        assert all(process.poll() is None for process in [server, *sites.values()])
        rows = medray("federate", "status", "federations/hearts", cwd=tmp_path)
        assert rows.count("online") == len(SITES) and "finished:completed" in rows
    for name, home in homes.items():
        log = medray("site", "audit", "audit.jsonl", cwd=home)
        assert ("released" in log) and ("is none of allow.recipes" in log) == (name == "wien"), log


def _runs(folder: Path) -> None:
    start = ["federate", "run", "federations/hearts", *SETTINGS]
    medray(*start, "federation.rounds=2", "federation.secure_aggregation=true", "--out", "secret", cwd=folder)
    ended(folder / "secret")
    record = json.loads((folder / "secret" / "federation.json").read_text(encoding="utf-8"))
    for entry in record["history"]:
        states = {name: row["state"] for name, row in entry["sites"].items()}
        assert states == {"bonn": "ok", "jena": "ok", "kiel": "ok", "wien": "failed"}, entry
        assert "norm" not in entry["sites"]["bonn"] and entry["sites"]["bonn"]["cases"] is None
    # kiel takes part in nothing else, wien in nothing at all: below the quorum of three it takes two.
    medray(*start, "federation.rounds=1", "federation.quorum=2", "--out", "clear", cwd=folder)
    ended(folder / "clear")
    log = (folder / "clear" / "run.log").read_text(encoding="utf-8")
    assert "kiel failed" in log and "require_secure_aggregation is true" in log and "none of allow.recipes" in log
    for run in ("secret", "clear"):
        assert (folder / run / "bundle").is_dir() and len(weights(folder / run)) == 2
    page = (folder / "secret" / "report.html").read_text(encoding="utf-8")
    assert "the server learns the sum" in page
