"""Several processes train what one would have trained: over torch.distributed, and brought up by Ray Train."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medray.train.runtime import LocalRuntime
from tests.integration.ray.group_process import SCENARIOS, outcome

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=[2, 3])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What so many processes made of all scenarios."""
    size, folder = request.param, tmp_path_factory.mktemp("group")
    command = [sys.executable, "-m", "tests.integration.ray.group_process", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(size)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)
    found: dict[str, Any] = torch.load(folder / f"group-{size}.pt", weights_only=True)
    return found


@cache
def alone(name: str) -> dict[str, Any]:
    return outcome(name, LocalRuntime())


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_group_learns_what_one_process_does(group: dict[str, Any], name: str) -> None:
    """20 steps in float64: losses, metrics and weights differ by what summing in another order leaves, no more."""
    ours, theirs = alone(name), group["found"][name]
    np.testing.assert_allclose(theirs["rows"], ours["rows"], rtol=1e-10, atol=1e-10)
    for part in ("weights", "last"):
        assert theirs[part].keys() == ours[part].keys()
        for key, value in ours[part].items():
            torch.testing.assert_close(theirs[part][key], value, rtol=1e-10, atol=1e-10, msg=f"{part} {key}")


def test_a_group_keeps_its_promises(group: dict[str, Any]) -> None:
    assert all(all(kept.values()) for kept in group["promises"]), group["promises"]
