"""The main job, as `make demo` runs it, at the smallest size: phantom to report, bundle and answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEDRAY = [sys.executable, "-m", "medray"]
BUDGET = 45.0


def medray(*words: str, cwd: Path, timeout: float = 300) -> str:
    done = subprocess.run([*MEDRAY, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"medray {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(working folder, what was printed)."""
    folder = tmp_path_factory.mktemp("main job")
    printed = medray(
        "tune", str(ROOT / "search_spaces" / "demo.yaml"), "data=phantom://ct-lesions?cases=12&size=24",
        f"study.budget={BUDGET:g}", "study.trials=2", "study.name=e2e", cwd=folder, timeout=BUDGET * 4,
    )  # fmt: skip
    return folder, printed


def test_report_and_bundle_lie_where_they_are_said_to(study: tuple[Path, str]) -> None:
    folder, printed = study
    for name in ("report", "bundle"):
        (place,) = re.findall(rf"^{name}: (.+)$", printed, re.MULTILINE)
        assert (folder / place).exists()
    report = (folder / "runs" / "e2e" / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=[\"']https?://", report)  # one file, nothing fetched
    assert "not a medical device" in report.lower()


def test_resuming_a_finished_study_says_the_same(study: tuple[Path, str]) -> None:
    folder, printed = study
    again = medray("tune", "--resume", "runs/e2e", cwd=folder)
    assert printed.splitlines()[-2:] == again.splitlines()[-2:]


def test_the_bundle_answers_by_both_runtimes_in_the_inputs_geometry(study: tuple[Path, str]) -> None:
    import nibabel as nib
    import numpy as np

    folder = study[0]
    medray("data", "phantom", "ct-lesions", "new", "--cases", "2", "--size", "24", "--seed", "7", cwd=folder)
    images = sorted((folder / "new").rglob("images/**/*.nii.gz")) or sorted(
        (folder / "new" / "images").glob("*.nii.gz")
    )
    answers = {}
    for runtime in ("torch", "onnx"):
        out = folder / f"answers-{runtime}"
        medray("predict", "runs/e2e/bundle", *map(str, images), "-o", str(out), "--runtime", runtime, cwd=folder)
        answers[runtime] = [nib.load(path) for path in sorted(out.glob("*.nii.gz"))]
        assert len(answers[runtime]) == len(images)
    for image, torch_answer, onnx_answer in zip(images, answers["torch"], answers["onnx"], strict=True):
        source = nib.load(image)
        assert torch_answer.shape == source.shape[:3] and np.allclose(torch_answer.affine, source.affine)
        assert (np.asarray(torch_answer.dataobj) == np.asarray(onnx_answer.dataobj)).mean() >= 0.995


def test_the_bundle_is_scored_on_labelled_data(study: tuple[Path, str]) -> None:
    printed = medray("evaluate", "runs/e2e/bundle", "phantom://ct-lesions?cases=4&size=24&seed=9", cwd=study[0])
    assert re.search(r"^dice\s+\S+ \[", printed, re.MULTILINE)
