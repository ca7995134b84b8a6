"""What a driver keeps of a trial's reports, and tells Optuna of them."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from medray.config.schema import StudyConfig
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.storage import MemoryFile
from tests.unit.search.studies import DEFAULT, SPACE, run, score, study


def test_a_pruned_trial_is_pruned_to_optuna_with_its_values(tmp_path: Path) -> None:
    with study(tmp_path, pruner="asha") as driver:
        run(driver, 1)
        task = driver.ask()
        assert task is not None
        assert driver.report(task.number, 7, 1 / 9, {"val/dice": -50.0})
        driver.prune(task.number)
        trial = driver._study.trials[1]
        assert trial.state == optuna.trial.TrialState.PRUNED
        assert trial.intermediate_values == {111: -50.0} and trial.value == -50.0
        record = driver.record(1)
        assert (
            record.values is None and record.metrics == {"val/dice": -50.0} and record.fraction == pytest.approx(1 / 9)
        )


def test_an_asha_study_is_stored_with_pruned_trials_and_their_values(tmp_path: Path) -> None:
    with study(tmp_path, pruner="asha", trials=20) as driver:
        run(driver)
    stored = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    pruned = [trial for trial in stored if trial.state == optuna.trial.TrialState.PRUNED]
    ended = [trial for trial in stored if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(pruned) + len(ended) == 20 and len(pruned) > 8
    for trial in pruned:
        assert list(trial.intermediate_values) in ([111], [111, 333]), "cut off at a rung"
        assert trial.intermediate_values[111] == pytest.approx(score(trial.params) - 8 / 9)
    assert all(list(trial.intermediate_values) == [111, 333, 1000] for trial in ended)
    assert all(trial.value == pytest.approx(score(trial.params)) for trial in ended)


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
def test_a_plan_that_is_extended_late_moves_its_reports_and_loses_none(tmp_path: Path, in_memory: bool) -> None:
    config = StudyConfig(trials=12, pruner="curve")
    file = MemoryFile() if in_memory else None
    with StudyDriver(Space.parse(SPACE), config, {"val/dice": "max"}, tmp_path, DEFAULT, file=file) as driver:
        other, leading = driver.ask(), driver.ask()
        assert other is not None and leading is not None
        driver.report(other.number, 1000, 1.0, {"val/dice": 0.91})
        for step, dice in ((200, 0.86), (300, 0.87), (500, 0.89), (700, 0.92), (850, 0.93)):
            assert not driver.report(leading.number, step, step / 1000, {"val/dice": dice})
        # Another program had gone: 1700 steps are planned now. On a warm restart it's worse for a while.
        assert not driver.report(leading.number, 851, 851 / 1700, {"val/dice": 0.88})
        assert not driver.report(leading.number, 1054, 1054 / 1700, {"val/dice": 0.87})
        history = driver.record(leading.number).history
        assert [entry["step"] for entry in history] == [200, 300, 500, 700, 850, 851, 1054]
        assert [entry["fraction"] for entry in history] == pytest.approx([e["step"] / 1700 for e in history])
        driver.prune(leading.number)
        stored = driver._study.trials[leading.number]
        places = {round(1000 * entry["fraction"]): entry["metrics"]["val/dice"] for entry in history}
        assert stored.intermediate_values == places and stored.value == 0.87


def test_a_resumed_trial_leaves_optuna_nothing_that_did_not_happen(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        lost = driver.ask()
        assert lost is not None
        for step in (1, 2, 3, 4):
            driver.report(lost.number, step, step / 10, {"val/dice": 0.1 * step})
    with study(tmp_path) as driver:
        assert driver.ask() == lost
        driver.report(lost.number, 3, 0.3, {"val/dice": 0.5})
        assert driver._study.trials[0].intermediate_values == pytest.approx({100: 0.1, 200: 0.2, 300: 0.5})


def test_a_study_in_memory_draws_and_stops_as_one_in_a_file(tmp_path: Path) -> None:
    found = []
    for file in (None, MemoryFile()):
        config = StudyConfig(trials=30, pruner="asha")
        space = Space.parse(SPACE)
        with StudyDriver(space, config, {"val/dice": "max"}, tmp_path, DEFAULT, file=file) as driver:
            found.append((run(driver), driver.counts()))
    assert found[0] == found[1] and found[0][1]["pruned"] > 0 and len(found[0][0]) == 30
