"""Checkpoints: whole at any instant, and nothing is unpickled."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from medray.errors import TrainingError
from medray.train.checkpoint import load, save
from medray.train.seeding import get_rng, set_rng


def test_round_trip_of_tensors_random_states_and_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "checkpoint.pt"
    assert load(path) is None
    state = {"w": torch.randn(3), "rng": get_rng(), "rows": [{"a": 1.5, "b": None}], "name": "ü"}
    save(path, state)
    found = load(path)
    assert found is not None and torch.equal(found["w"], state["w"]) and found["rows"] == state["rows"]
    expected = torch.rand(3)
    set_rng(found["rng"])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save(path, {"w": torch.randn(1000)})
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[-30] ^= 0xFF
    elif damage == "empty":
        content = bytearray()
    else:
        content = bytearray(b"not a checkpoint")
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: .*delete it to start anew"):
        load(path)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "checkpoint.pt"
    torch.save({"version": 1, "x": Evil()}, path)
    with pytest.raises(TrainingError):
        load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TrainingError):
        load(path)
    assert not (tmp_path / "owned").exists()


def test_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 99}, tmp_path / "c.pt")
    with pytest.raises(TrainingError, match="version 99"):
        load(tmp_path / "c.pt")


def test_a_kill_while_writing_leaves_the_former_or_the_next(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    program = (
        "import sys, torch, pathlib\n"
        "from medray.train.checkpoint import save\n"
        "path = pathlib.Path(sys.argv[1]); n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    save(path, {'n': n, 'w': torch.full((500_000,), float(n))})\n"
    )
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=root)
    try:
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.37)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = load(path)
    assert state is not None and torch.equal(state["w"], torch.full((500_000,), float(state["n"])))
