"""Every benchmark runs by the path of its full size, at a size that ends in about a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import Result, names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", names())
def test_quick(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    if done.returncode != 0 and "the real data are not there" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    result, _ = Result.load(tmp_path / f"{name}.json")
    assert result.figures and result.targets.keys() <= result.figures.keys()
