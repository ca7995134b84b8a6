"""A new task is one file and one line: this file is the one, ``toy`` the other, and the whole way is gone with it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import medray
from medray.bundle.read import Bundle
from medray.errors import ConfigError
from medray.tasks.catalogue import TASKS
from medray.tasks.classification import Classification
from medray.workflows import champion as choosing
from medray.workflows.champion import Candidate
from medray.workflows.check import check_data
from medray.workflows.evaluation import evaluate
from medray.workflows.packing import write_champion
from medray.workflows.planning import prepare_directory
from medray.workflows.prediction import predict_files
from medray.workflows.recipe import Recipe
from medray.workflows.results import classification_results, data_summary
from medray.workflows.training import train_model

DATA = "phantom://xray-nodules?cases=24&size=32"


class RuleOut(Classification):
    """The first class is told only where all others together are improbable; what counts is to miss none of them."""

    name = "rule-out"
    description = "whether an image shows nothing at all"
    losses: ClassVar[Any] = {"focal": Classification.losses["focal"]}
    metrics: ClassVar[Any] = {"missed": "min", "accuracy": "max"}
    evaluated = ("missed", "accuracy")
    guarded = ("accuracy",)
    tie = None

    def decide(self, probabilities: Any, thresholds: Any = None) -> Any:
        rest = probabilities[:, 1:]
        return np.where(rest.sum(axis=1) < 0.1, 0, 1 + rest.argmax(axis=1))

    def measures(self, targets: Any, probabilities: Any, thresholds: Any = None) -> dict[str, float]:
        decided = self.decide(probabilities)
        missed = (decided == 0)[targets > 0]
        return {
            "missed": float(missed.mean()) if missed.size else float("nan"),
            "accuracy": float((decided == targets).mean()),
        }

    def measure(self, metric: str, *arrays: Any) -> float:
        return self.measures(*arrays)[metric]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS, RuleOut.name, RuleOut())  # the one line
    return RuleOut.name


def test_one_file_and_one_line_make_a_task(toy: str, tmp_path: Path) -> None:
    manifest = check_data(DATA, task=toy)
    assert manifest.task == toy and not [f for f in manifest.findings if f.severity == "error"]
    prepare_directory(DATA, tmp_path, task=toy)
    explicit = {
        "data": DATA,
        "device": "cpu",
        "task": {"kind": toy},
        "model": {"name": "small_cnn", "feature_size": 4, "depth": 2},
        "augment": {"strength": 0.0},
        "train": {"epochs": 2, "batch_size": 8, "precision": "fp32"},
    }
    recipe = Recipe(directory=str(tmp_path), explicit=explicit, cache=str(tmp_path / "cache"))
    experiment = recipe.experiment()
    assert experiment.loss.name == "focal", "the plan takes the task's first loss"
    with pytest.raises(ConfigError, match="rule-out task; use one of focal"):
        recipe.experiment({"loss.name": "cross_entropy"})

    trained = train_model(recipe, experiment, tmp_path / "run")
    assert set(trained.fit.best) == {"val/missed", "val/accuracy"}
    splits = recipe.splits(experiment)
    candidate = Candidate(name="default", members=(trained,))
    scores = choosing.score(recipe, [candidate], splits.val, metric="missed")["default"]
    temperature = choosing.temperature_of(scores)
    curves = classification_results(recipe, scores, temperature)
    assert curves.confusion is not None and curves.confusion.sum() == len(splits.val)
    assert data_summary(recipe, DATA, splits).task == toy

    place = tmp_path / "bundle"
    write_champion(
        place, recipe, candidate, scores, name="toy", temperature=temperature, metrics=scores.intervals(), notes=()
    )
    bundle = Bundle.open(place)
    assert bundle.spec.kind == toy and "onnx" in bundle.runtimes
    assert RuleOut.description in (place / "card.md").read_text(encoding="utf-8")
    summary = predict_files(place, [manifest.cases[0].images[0]], tmp_path / "answers", "onnx")
    (answer,) = summary.answers
    assert answer.error is None and answer.probabilities is not None
    rest = answer.probabilities["nodule"]
    assert answer.classes == (("nodule",) if rest >= 0.1 else ("normal",)), "decided by the task's own rule"
    found = evaluate(bundle, DATA, runtime="onnx", split="all", cases=list(splits.test or splits.val))
    assert set(found.metrics) == {"missed", "accuracy"} and not found.failed


def test_nobody_asks_a_task_for_its_name() -> None:
    """Who compares names has to be found by whoever adds a task; there are fields and methods for it."""
    wrong = []
    root = Path(medray.__file__).parent
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root).as_posix()
        if where.startswith("tasks/") or where in ("models/genotypes.py", "models/operations.py"):
            continue  # the last two tell kinds of searched networks apart, which have two of the same names
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                said = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                wrong += [f"{where}:{node.lineno}: {name}" for name in said if name in TASKS]
    assert not wrong, "\n".join(wrong)
