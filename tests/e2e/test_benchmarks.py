"""Benchmarks run by the path of their full size, at a size that ends in about a minute.

Those that take longer even so are left to ``make bench-quick``: the whole of ``make test`` has half an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Studies that several benchmarks read are run once, in a folder of this session."""
    return {**os.environ, "MEDRAY_BENCH_RUNS": str(tmp_path_factory.mktemp("runs"))}


HERE = ("bad_input", "hippocampus", "medmnist", "step")
"""What the others measure is tested elsewhere in seconds: by the workflows' own tests, and in integration/."""


@pytest.mark.parametrize("name", HERE)
def test_quick(name: str, tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, env=environment)
    if done.returncode != 0 and "the real data are not there" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    result, _ = Result.load(tmp_path / f"{name}.json")
    assert result.figures and result.targets.keys() <= result.figures.keys()
