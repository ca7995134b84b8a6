"""Ordinal grading the whole way: a study on phantoms, its report, its bundle, and answers by ONNX Runtime.

Trials run in this process: what Ray does with them is tested in ``ray/``.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from medray.bundle.read import Bundle
from medray.data.layouts import build_manifest
from medray.data.phantoms.files import write_phantom
from medray.data.readers import read_case
from medray.engines.ray.serve import answers
from medray.explain.cam import explain
from medray.workflows import forecast, study
from medray.workflows.evaluation import evaluate
from medray.workflows.prediction import predict_files
from tests.integration.test_select import no_session, run_here

GRADES = ("none", "small", "moderate", "large")
SPACE = """
task: {kind: ordinal}
device: cpu
model: {name: small_cnn, feature_size: 8, depth: 3}
augment: {strength: 0.2}
train: {epochs: 12, batch_size: 8, precision: fp32}
study: {name: graded, budget: 20min, trials: 2, pruner: none, sampler: random, warm_start: false}
space:
  optim.lr: {choice: [3.0e-3, 1.0e-2]}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with whole numbers for grades, as clinics write them; no classes.json says what they mean."""
    folder = tmp_path_factory.mktemp("films")
    path = write_phantom("xray-effusion", folder, cases=60, size=32)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = str(GRADES.index(row["label"]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "classes.json").unlink()
    return path


@pytest.mark.timeout(900)
def test_grades_from_a_table_to_answers(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ray_session", no_session)
    monkeypatch.setattr(study, "run_trials", run_here)
    monkeypatch.setattr(study, "call_all", lambda function, tasks, **_: [function(task) for task in tasks])
    monkeypatch.setattr(forecast, "time_step", lambda *_, **__: None)
    space = tmp_path / "space.yaml"
    space.write_text(SPACE, encoding="utf-8")
    result = study.tune(space, [f"data={table}"], runs=tmp_path / "runs")

    told = json.loads((result.directory / "result.json").read_text(encoding="utf-8"))
    assert told["metric"] == "kappa" and {"kappa", "mae", "accuracy", "rps"} <= set(told["metrics"])
    report = result.report.read_text(encoding="utf-8")
    assert "kappa" in report and "ordinal" in report and "1 or more" in report

    bundle = Bundle.open(result.bundle)
    assert (bundle.spec.kind, bundle.spec.classes, bundle.spec.outputs) == ("ordinal", ("0", "1", "2", "3"), 3)
    assert bundle.golden()[1].shape[1] == 3
    manifest = build_manifest(str(table), task="ordinal")
    images = [table.parent / case.images[0] for case in manifest.cases[:6]]
    told_by_onnx = predict_files(result.bundle, images, tmp_path / "answers", "onnx").answers
    with (tmp_path / "answers" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for answer, row, case in zip(told_by_onnx, rows, manifest.cases, strict=False):
        assert answer.error is None and answer.probabilities is not None
        p = np.array(list(answer.probabilities.values()))
        assert p.sum() == pytest.approx(1, abs=1e-5)
        median = str(int((1 - p.cumsum()[:-1] > 0.5).sum()))
        assert answer.classes == (median,) and row["prediction"] == median
        image, _, _ = read_case(case, Path(manifest.root))
        twin = bundle.predict(image)
        assert np.allclose(twin.probabilities, p, atol=1e-3), "torch and ONNX Runtime say the same"

    case = next(case for case in manifest.cases if case.label == 3)
    image, _, _ = read_case(case, Path(manifest.root))
    served = answers.as_json(bundle, bundle.predict(image), image, [], {})
    assert served["task"] == "ordinal" and list(served["probabilities"]) == ["0", "1", "2", "3"]
    assert len(served["classes"]) == 1 and 0 <= served["uncertainty"] <= 1 and answers.choose(None, "ordinal") == "json"
    seen = explain(bundle, image, target="3")
    assert seen.heat.shape == image.shape and seen.target_name == "3" and np.isfinite(seen.heat).all()

    found = evaluate(bundle, str(table), runtime="onnx", split="all")
    assert set(found.metrics) == set(bundle.spec.task.evaluated) and found.confusion is not None
    kappa = found.metrics["kappa"]
    assert kappa.value > 0.3 and kappa.low > 0, "a few steps are enough to tell a large effusion from none"
