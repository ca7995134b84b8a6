"""From limits and rule to the trial that is fitted to the end and the candidate that is crowned; measuring is faked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medray.config.schema import StudyConfig
from medray.errors import BundleError, ConfigError, StudyError
from medray.learn.intervals import Interval
from medray.search.selection import Chooser
from medray.search.trial import TrialRecord
from medray.workflows import selecting
from medray.workflows.champion import Candidate, Scores
from medray.workflows.costs import Costs
from medray.workflows.selecting import Quiet, crown, figure_name, make_chooser, pick_trial
from medray.workflows.selection_results import plain, selection_summary

OBJECTIVE = ("val/auc", "max")
METRICS = ("val/auc", "val/accuracy", "val/f1")


def costs(latency: float, *, half: float = 0.5, size: float = 1.0, **changes: Any) -> Costs:
    found = Costs(
        engine="onnx", precision="fp32", fallen=None, machine="ward-3 (CPU, 2 cores)", device="cpu", threads=2,
        shape=(1, 32, 32), latency_ms=Interval(latency, latency - half, latency + half),
        latency_p95_ms=Interval(latency * 2, latency, latency * 3), fastest_ms=latency / 2,
        memory_mb=Interval(500.0, 499.0, 500.0), size_mb=size, parameters=1000, processes=3, calls=90, others=0.0,
        trained=True, seconds=9.0, process_seconds=2.0,
    )  # fmt: skip
    return replace(found, **changes)


def chooser(objectives: dict[str, Any] | None = None, **select: Any) -> Chooser:
    study = StudyConfig.model_validate({"select": select})
    return make_chooser(study, objectives or {"val/auc": "max"}, OBJECTIVE, METRICS)


def trial(number: int, auc: float, latency: float, **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "number": number, "state": "completed", "params": {}, "is_default": number == 0, "in_space": True,
        "metrics": {"val/auc": auc, "latency_ms": latency}, "values": (auc,), "fraction": 1.0, "seconds": 1.0,
        "stopped": "finished", "history": (), "extras": {"others": 0.15}, "error": None,
        "directory": Path(f"{number:04d}"), "ended": 10.0 * number, "constraints": {"latency_ms": latency / 50 - 1},
    }  # fmt: skip
    return TrialRecord(**(fields | changes))


class Bench:
    """Stands in for the machine: a candidate's name to what it costs when looked at, and then with its own weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], afresh: dict[str, Any] | None = None):
        self.looks: list[tuple[str, bool]] = []
        self.first, self.then = first, first | (afresh or {})
        monkeypatch.setattr(selecting, "costs_of", self.costs_of)
        # Two thousand draws of an AUC take a second, and say nothing here.
        monkeypatch.setattr(Scores, "interval", lambda scores: Interval(scores.value, float("nan"), float("nan")))
        monkeypatch.setattr(
            selecting, "load_trained", lambda _recipe, directory: SimpleNamespace(number=int(directory.name))
        )

    def costs_of(
        self, _recipe: Any, candidate: Candidate, _folder: Path, *, quiet: bool, afresh: bool = False
    ) -> Costs:
        assert quiet
        self.looks.append((candidate.name, afresh))
        found = (self.then if afresh else self.first)[candidate.name]
        if isinstance(found, Exception):
            raise found
        return found


def quiet(**changes: Any) -> Quiet:
    fields: dict[str, Any] = {"recipe": SimpleNamespace(directory="."), "budget": 1e4, "tell": lambda _: None}
    return Quiet(**(fields | changes))


# Names and settings --------------------------------------------------------------------------------------------------


def test_the_studys_metric_is_called_accuracy_and_the_real_accuracy_by_its_full_name() -> None:
    found = [figure_name(name, "val/auc") for name in ("val/auc", "val/f1", "val/accuracy", "latency_ms")]
    assert found == ["accuracy", "f1", "val/accuracy", "latency_ms"]
    assert figure_name("val/accuracy", "val/accuracy") == "accuracy"


def test_an_expression_over_unknown_figures_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"no figure 'speed'.*latency_ms.*accuracy is the study's metric, val/auc"):
        chooser(rule="weighted", expression="accuracy + speed")
    assert "f1" in chooser(rule="weighted", expression="accuracy + f1").needs


def test_pareto_wants_several_objectives() -> None:
    with pytest.raises(ConfigError, match="latency_ms=min"):
        chooser(rule="pareto")
    assert chooser({"latency_ms": "min", "val/auc": "max"}).rule == "pareto"


# The trial that is fitted to the end ---------------------------------------------------------------------------------


def test_the_best_trial_that_keeps_the_limit_when_looked_at_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {"trial 2": costs(60.0), "trial 1": costs(30.0), "trial 0": costs(90.0)})
    records = [trial(0, 0.9, 90.0), trial(1, 0.92, 30.0), trial(2, 0.95, 45.0), trial(3, 0.1, 1.0)]
    best, keeps = pick_trial(records, chooser(limits={"latency_ms": 50}), "val/auc", quiet())
    assert best is not None and best.number == 1 and keeps
    assert bench.looks == [("trial 2", False), ("trial 1", False)], "only those that could win"


def test_a_trial_that_others_disturbed_gets_its_due(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"trial 1": costs(30.0)})
    records = [trial(0, 0.9, 45.0), trial(1, 0.95, 60.0, extras={"others": 0.5})]
    best, keeps = pick_trial(records, chooser(limits={"latency_ms": 50}), "val/auc", quiet())
    assert best is not None and best.number == 1 and keeps


def test_what_nobody_disturbed_and_is_clear_need_not_be_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {"trial 0": costs(48.0)})
    rule, calm = chooser(limits={"latency_ms": 50}), {"others": 0.02}
    best, _ = pick_trial([trial(0, 0.9, 20.0, extras=calm)], rule, "val/auc", quiet())
    assert best is not None and not bench.looks
    pick_trial([trial(0, 0.9, 48.0, extras=calm)], rule, "val/auc", quiet())
    assert bench.looks == [("trial 0", False)], "within a tenth of the limit it is"


def test_where_every_trial_breaks_the_limit_there_is_none_or_the_least_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"trial 0": costs(90.0), "trial 1": costs(70.0)})
    records = [trial(0, 0.95, 90.0), trial(1, 0.9, 70.0)]
    with pytest.raises(StudyError, match=r"(?s)trial 1: latency_ms 59.*trial 0: latency_ms 76.*study\.trials=N"):
        pick_trial(records, chooser(limits={"latency_ms": 50}), "val/auc", quiet())
    assert pick_trial(records[1:], chooser(limits={"latency_ms": 50}), "val/auc", quiet()) == (None, False)
    best, keeps = pick_trial(records, chooser(limits={"latency_ms": 50}, on_fail="last"), "val/auc", quiet())
    assert best is not None and best.number == 1 and not keeps
    assert pick_trial([], chooser(limits={"latency_ms": 50}), "val/auc", quiet()) == (None, False)


def test_the_limit_on_accuracy_waits_for_the_finalists(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {})
    best, keeps = pick_trial([trial(0, 0.5, 1.0)], chooser(limits={"accuracy": 0.9}), "val/auc", quiet())
    assert best is not None and keeps and not bench.looks


def test_a_trial_that_cannot_be_measured_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"trial 1": BundleError("it died"), "trial 0": costs(10.0)})
    said: list[str] = []
    records, rule = [trial(0, 0.9, 10.0), trial(1, 0.95, 20.0)], chooser(limits={"latency_ms": 50})
    best, keeps = pick_trial(records, rule, "val/auc", quiet(tell=said.append))
    assert best is not None and best.number == 0 and keeps and said == ["trial 1: it died"]


def test_looking_ends_with_its_share_of_the_budget_once_one_keeps_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {"trial 1": costs(40.0), "trial 2": costs(45.0), "trial 0": costs(10.0)})
    records = [trial(0, 0.9, 10.0), trial(1, 0.92, 20.0), trial(2, 0.95, 45.0)]
    rule = chooser({"val/auc": "max", "latency_ms": "min"}, limits={"latency_ms": 50})
    best, keeps = pick_trial(records, rule, "val/auc", quiet(budget=1.0))
    assert best is not None and keeps and len(bench.looks) == 1


# The candidate that is crowned ---------------------------------------------------------------------------------------


def scores(auc: float) -> Scores:
    """About such an AUC on 40 cases."""
    targets = np.arange(40) % 2
    wrong = np.arange(40) % 20 < round(20 * (1 - auc))
    logit = np.where(wrong, 1 - targets, targets) * 2.0 - 1.0
    logits = np.stack([-logit, logit], axis=1).astype(np.float32)
    groups = np.asarray([f"p{i}" for i in range(40)])
    return Scores(
        kind="classification", indices=tuple(range(40)), groups=groups, logits=logits, targets=targets, metric="auc"
    )


def candidate(name: str, members: int = 1) -> Candidate:
    network = SimpleNamespace(model=SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: 500)]))
    return Candidate(name=name, members=(network,) * members)  # type: ignore[arg-type]


CANDIDATES = [candidate("default"), candidate("trial-4"), candidate("average of 2", 2)]
SCORES = {"default": scores(0.7), "trial-4": scores(0.8), "average of 2": scores(0.9)}
RECORDS = [trial(0, 0.7, 20.0), trial(4, 0.8, 30.0), trial(5, 0.85, 80.0)]


def test_the_best_that_keeps_the_limit_is_crowned_after_a_look_with_its_own_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, {"default": costs(20.0), "trial-4": costs(30.0), "average of 2": costs(55.0)})
    rule = chooser(limits={"latency_ms": 50})
    crowning = crown(CANDIDATES, SCORES, rule, "val/auc", RECORDS, quiet())
    assert crowning.winner == "trial-4" and bench.looks == [("average of 2", True), ("trial-4", True)]
    assert crowning.reasons["default"] == "not measured: a better one is chosen"
    assert [found.option.name for found in crowning.ranked if found.refused] == ["average of 2", "default"]
    assert "every limit (1 of 3)" in crowning.why and "Refused: average of 2" in crowning.why
    (average,) = [row for row in plain(crowning, rule)["candidates"] if row["name"] == "average of 2"]
    assert average["broken"] == ["latency_ms"] and average["figures"]["latency_ms"] == [55.0, 54.5, 55.5]


def test_a_winner_that_breaks_the_limit_with_its_own_weights_is_not_crowned(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"default": costs(20.0), "trial-4": costs(30.0), "average of 2": costs(45.0)}
    bench = Bench(monkeypatch, first, {"average of 2": costs(49.8), "trial-4": costs(70.0)})
    crowning = crown(CANDIDATES, SCORES, chooser(limits={"latency_ms": 50}), "val/auc", RECORDS, quiet())
    assert crowning.winner == "default", "49.8 ± 0.5 does not keep 50"
    assert bench.looks == [("average of 2", True), ("trial-4", True), ("default", True)]
    rule = chooser({"val/auc": "max", "latency_ms": "min"}, limits={"latency_ms": 50})
    assert crown(CANDIDATES, SCORES, rule, "val/auc", RECORDS, quiet()).winner == "default"


def test_where_none_keeps_the_limits_none_is_crowned_and_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"default": costs(80.0), "trial-4": costs(90.0), "average of 2": BundleError("out of memory")})
    with pytest.raises(StudyError, match=r"(?s)default: latency_ms 80 \(95 % CI to 80\.5\), limit 50.*average of 2: "
                       r"latency_ms was not measured.*out of memory.*on_fail=last"):  # fmt: skip
        crown(CANDIDATES, SCORES, chooser(limits={"latency_ms": 50}), "val/auc", RECORDS, quiet())
    rule = chooser(limits={"latency_ms": 50}, on_fail="last")
    crowning = crown(CANDIDATES, SCORES, rule, "val/auc", RECORDS, quiet())
    assert crowning.winner == "default"
    assert selection_summary(crowning, rule, OBJECTIVE, RECORDS).remark == "; BREAKS latency_ms (50)"


def test_an_ensemble_that_there_was_no_time_to_measure_is_not_crowned(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"default": costs(20.0), "trial-4": costs(30.0)})
    rule = chooser({"val/auc": "max", "latency_ms": "min"}, limits={"latency_ms": 50})
    crowning = crown(CANDIDATES, SCORES, rule, "val/auc", RECORDS, quiet(budget=1.0))
    assert crowning.winner in ("trial-4", "default") and "its time was over" in crowning.reasons["average of 2"]


def test_the_best_without_limits_is_measured_where_its_cost_is_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {"average of 2": costs(55.0)})
    rule = chooser({"val/auc": "max", "latency_ms": "min"}, rule="best")
    crowning = crown(CANDIDATES, SCORES, rule, "val/auc", RECORDS, quiet())
    assert crowning.winner == "average of 2" and bench.looks == [("average of 2", True)]


def test_limits_on_what_is_counted_need_no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {})
    crowning = crown(CANDIDATES, SCORES, chooser(limits={"parameters": 500}), "val/auc", RECORDS, quiet())
    assert crowning.winner == "trial-4" and not bench.looks


def test_the_summary_shows_the_trade_off(monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"default": costs(20.0), "trial-4": costs(30.0), "average of 2": costs(55.0)})
    rule = chooser({"val/auc": "max", "latency_ms": "min"}, limits={"latency_ms": 50})
    crowning = crown(CANDIDATES, SCORES, rule, "val/auc", RECORDS, quiet())
    summary = selection_summary(crowning, rule, OBJECTIVE, RECORDS)
    assert summary.axes == ("val/auc", "latency_ms") and summary.rule == "pareto"
    points = {point.name: point for point in summary.points}
    assert points["trial 0"].on_front and points["trial 4"].on_front
    assert not points["trial 5"].on_front and not points["trial 5"].feasible
    assert points[crowning.winner].champion
    times, volumes = zip(*summary.hypervolume, strict=True)
    assert times == (0.0, 40.0, 50.0) and volumes[1] >= volumes[0] and volumes[2] == volumes[1], "beyond the limit"
    assert summary.rows[0].chosen and summary.rows[0].kept == {"latency_ms": True}
    assert "ward-3" in summary.measured[0]
    assert list(summary.rows[0].figures) == ["val/auc", "latency_ms"], "the metric by its own name"
