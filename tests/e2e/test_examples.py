"""Every example, as a reader would run it; those that need a bundle share that of the one study."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medray.bundle.read import Bundle
from medray.bundle.write import write_bundle
from medray.config.compose import compose
from medray.models.catalogue import build_model
from medray.search.space import Space

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
UNSEEN = "phantom://fundus-vessels?cases=4&seed=9&size=32"


def call(words: list[str], cwd: Path, *, env: dict[str, str] | None = None, timeout: float = 240) -> str:
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=os.environ | (env or {}), check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def example(name: str, *arguments: str, cwd: Path) -> str:
    return call([sys.executable, str(EXAMPLES / name), *arguments], cwd)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's search space, run: the folder of the study.

    Counted in epochs, not seconds: a budget that a busy machine can't miss, and an end as soon as all is done.
    """
    folder = tmp_path_factory.mktemp("examples")
    fast = ["study.trials=2", "study.budget=8min", "train.epochs=2", "study.ensemble=false"]
    call([sys.executable, "-m", "medray", "tune", str(EXAMPLES / "search_space.yaml"), *fast], folder, timeout=500)
    return folder / "runs" / "example"


@pytest.fixture(scope="session")
def other(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second bundle of the same task: the study's first network, untrained."""
    spec = Bundle.open(study / "bundle").spec
    config = spec.members[0]
    torch.manual_seed(1)
    model = build_model(
        config, kind=spec.kind, ndim=spec.ndim, in_channels=spec.channels, num_outputs=len(spec.classes),
        patch_size=spec.inference.patch_size,
    )  # fmt: skip
    return write_bundle(
        tmp_path_factory.mktemp("other") / "bundle", kind=spec.kind, ndim=spec.ndim, channels=spec.channels,
        classes=spec.classes, name="other", preprocess=spec.preprocess, inference=spec.inference, models=[model],
        configs=[config], onnx=False,
    ).directory  # fmt: skip


def test_the_readme_lists_every_example_and_nothing_else() -> None:
    listed = set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}


def test_check_data(tmp_path: Path) -> None:
    printed = example("check_data.py", cwd=tmp_path)
    assert len(re.findall(r"^error +unreadable", printed, re.MULTILINE)) == 2
    assert re.search(r"^warning duplicate", printed, re.MULTILINE) and "not fit for training" in printed


def test_table_with_patients(tmp_path: Path) -> None:
    printed = example("table_with_patients.py", cwd=tmp_path)
    assert "no patient stands on two sides" in printed and "'age': 40.0" in printed


def test_plan_and_edit(tmp_path: Path) -> None:
    printed = example("plan_and_edit.py", "phantom://ct-lesions?cases=6&size=16", str(tmp_path / "plan"), cwd=tmp_path)
    assert "a wrong field is refused" in printed and "unet on a large GPU" in printed
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {
        "experiment.yaml", "fingerprint.json", "manifest.json",
    }  # fmt: skip


def test_train(tmp_path: Path) -> None:
    first = example("train.py", str(tmp_path / "run"), "3", cwd=tmp_path)
    assert "val/dice" in first and "weights.safetensors" in first
    again = example("train.py", str(tmp_path / "run"), "3", cwd=tmp_path)  # it has ended: nothing is trained anew
    assert again.splitlines()[-2] == first.splitlines()[-2]


def test_the_search_space_has_conditions_and_two_objectives() -> None:
    composed = compose(EXAMPLES / "search_space.yaml", [])
    assert composed.study.objectives == {"val/dice": "max", "latency_ms": "min"}
    space = Space.parse(composed.space)
    chosen = {"model.name": "unet", "optim.lr": 1e-3, "train.batch_size": 4, "model.feature_size": 8,
              "loss.name": "tversky", "loss.alpha": 0.3, "loss.gamma": 2.0}  # fmt: skip
    assert "loss.gamma" not in space.active(chosen) and "loss.alpha" in space.active(chosen)


def test_read_results(study: Path, tmp_path: Path) -> None:
    printed = example("read_results.py", str(study), cwd=tmp_path)
    assert "gain over the default" in printed and "'trial': '0'" in printed
    assert re.search(r"^  dice: \d", printed, re.MULTILINE)


def test_automl(study: Path, tmp_path: Path) -> None:
    printed = example("automl.py", str(study), cwd=tmp_path)
    assert re.search(r"^0 +(completed|pruned)", printed, re.MULTILINE) and "default" in printed
    (mask,) = (tmp_path / "answers").glob("*_seg.png")
    assert mask.name in printed and f"report: {study / 'report.html'}" in printed


def test_predict(study: Path, tmp_path: Path) -> None:
    printed = example("predict.py", str(study / "bundle"), cwd=tmp_path)
    found = [(int(count), int(pixels)) for count, pixels in re.findall(r": (\d+) of (\d+) pixels", printed)]
    assert {pixels for _, pixels in found} == {sum(count for count, _ in found)}  # every pixel has one class
    assert "Not a medical device" in printed


def test_evaluate_and_compare(study: Path, other: Path, tmp_path: Path) -> None:
    printed = example("evaluate_and_compare.py", str(study / "bundle"), str(other), UNSEEN, cwd=tmp_path)
    assert "evaluation.json" in printed and "cases.csv" in printed
    assert re.search(r"^dice, first minus second: [+-]\d", printed, re.MULTILINE)


def test_custom_phantom(tmp_path: Path) -> None:
    printed = example("custom_phantom.py", str(tmp_path / "cysts"), cwd=tmp_path)
    assert "12 cases" in printed and "findings: []" in printed
    assert len(list((tmp_path / "cysts" / "images").iterdir())) == 12
    from medray.workflows.check import check_data

    assert check_data(str(tmp_path / "cysts" / "cases.csv")).classes == ("background", "cyst")


def test_ray_cluster(tmp_path: Path) -> None:
    """What the script runs, taken from a stand-in on the path; joining a cluster itself is tested with the engine."""
    stand_in = tmp_path / "bin" / "medray"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > asked.txt\n', encoding="utf-8")
    stand_in.chmod(0o755)
    path = {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}
    call(["bash", str(EXAMPLES / "ray_cluster.sh"), "head:6379", "study.trials=2"], tmp_path, env=path)
    verb, space, flag, address, *overrides = (tmp_path / "asked.txt").read_text(encoding="utf-8").splitlines()
    assert (verb, flag, address) == ("tune", "--address", "head:6379")
    composed = compose(Path(space), overrides)
    assert (composed.study.name, composed.study.trials, composed.study.concurrency) == ("cluster", 2, 8)
    done = subprocess.run(["bash", str(EXAMPLES / "ray_cluster.sh")], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "usage" in done.stderr
