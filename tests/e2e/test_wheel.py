"""The wheel: typed, complete, and at work outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # From a copy: a build writes into its source tree.
    source = out / "source"
    shutil.copytree(ROOT / "medray", source / "medray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert "medray/py.typed" in names
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medray" / "config").rglob("*.yaml")}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medray/engines/ray/serve/web").iterdir()}
    templates = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "medray" / "report" / "templates").iterdir() if p.is_file()
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medray").rglob("*.py")}
    assert configs and not (configs | templates | page | modules) - names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"medray"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in text and "Requires-Python: >=3.11" in text


def test_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, timeout=300)
    script = (
        "import medray, sys; assert medray.__file__.startswith(sys.argv[1]), medray.__file__\n"
        "from medray.config.compose import compose\n"
        "print(compose(None, ['augment=heavy']).explicit['augment']['rotate_deg'])\n"
        "sys.argv = ['medray', 'check', 'phantom://xray-nodules?cases=4&size=32']\n"
        "from medray.cli.main import main; main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30.0\n4 cases of ")
    assert (tmp_path / "runs" / "xray-nodules" / "manifest.json").is_file()
