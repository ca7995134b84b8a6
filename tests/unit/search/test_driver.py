from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from medray.errors import StudyError
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import TrialOutcome, TrialTask
from tests.unit.search.studies import DEFAULT, NUMERIC, OUTSIDE, SPACE, finish, run, score, study

# The default --------------------------------------------------------------------------------------------------------


def test_the_default_comes_first(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        task = driver.ask()
        assert task is not None and task.is_default and task.number == 0
        assert task.params == {key: value for key, value in DEFAULT.items() if value is not None}
        assert task.directory.is_dir()
        finish(driver, task)
        record = driver.default()
        assert record is not None and record.in_space and record.state == "completed"
        second = driver.ask()
        assert second is not None and not second.is_default and second.seed != task.seed


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2"])
def test_a_default_outside_the_space_is_hidden_from_the_sampler(tmp_path: Path, sampler: str) -> None:
    default = {"optim.lr": 0.5, "loss.alpha": 0.5, "n": 5}
    with study(tmp_path, space=NUMERIC, default=default, sampler=sampler, trials=30) as driver:
        drawn = run(driver)
        record = driver.default()
        assert drawn[0] == default and record is not None
        assert not record.in_space and record.state == "completed" and record.values == (score(default),)
        stored = driver._study.get_trials(deepcopy=False)
        assert stored[0].params == {}
        seen = driver._study.sampler._study(driver._study).get_trials()  # type: ignore[attr-defined]
        assert [trial.number for trial in seen] == list(range(1, 30))
        # An empty trial among those that the sampler sees leaves CMA-ES and NSGA-II nothing to search but at random.
        late = [score(params) for params in drawn[-8:]]
        early = [score(params) for params in drawn[1:9]]
    assert sum(late) > sum(early)


# Resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [DEFAULT, OUTSIDE], ids=["inside", "outside"])
@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_a_resumed_study_draws_what_it_would_have(tmp_path: Path, sampler: str, default: dict[str, Any]) -> None:
    with study(tmp_path / "whole", sampler=sampler, default=default) as driver:
        whole = run(driver)
    drawn: list[dict[str, Any]] = []
    for stop in (0, 1, 4, 2, 10_000):
        with study(tmp_path / "parts", sampler=sampler, default=default) as driver:
            drawn += run(driver, stop)
            task = driver.ask()  # and dies with it under way
            if stop == 10_000:
                assert task is None
    assert drawn == whole and len(whole) == 12


def test_cmaes_resumes_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"space": NUMERIC, "sampler": "cmaes", "default": {"optim.lr": 0.5}, "trials": 20}
    with study(tmp_path / "whole", **settings) as driver:
        whole = run(driver)
    with study(tmp_path / "parts", **settings) as driver:
        drawn = run(driver, 13)
    with study(tmp_path / "parts", **settings) as driver:
        drawn += run(driver)
    assert drawn == whole


def test_more_trials_on_resuming_do_not_change_what_is_drawn(tmp_path: Path) -> None:
    with study(tmp_path / "a", trials=30) as driver:
        whole = run(driver, 14)
    with study(tmp_path / "b", trials=30) as driver:
        drawn = run(driver, 12)
    with study(tmp_path / "b", trials=500) as driver:
        assert driver.sampler_name == "tpe"
        drawn += run(driver, 2)
    assert drawn == whole


def test_an_unfinished_trial_comes_again_with_number_params_and_folder(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        run(driver, 3)
        lost = driver.ask()
        assert lost is not None
        for index in (1, 2, 3, 4):
            driver.report(lost.number, index, index / 9, {"val/dice": 0.1 * index})
        (lost.directory / "checkpoint.pt").write_bytes(b"half-way")
    with study(tmp_path) as driver:
        assert driver.next_share == pytest.approx(5 / 9)
        again = driver.ask()
        assert again == lost
        assert (again.directory / "checkpoint.pt").read_bytes() == b"half-way"
        # The checkpoint was older than its last report: what came after it has to happen again.
        driver.report(again.number, 3, 3 / 9, {"val/dice": 0.5})
        history = driver.record(again.number).history
        assert [entry["metrics"]["val/dice"] for entry in history] == pytest.approx([0.1, 0.2, 0.5])


@pytest.mark.parametrize("default", [DEFAULT, OUTSIDE], ids=["inside", "outside"])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_killed_while_drawing_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, default: dict[str, Any]
) -> None:
    with study(tmp_path / "whole", default=default) as driver:
        whole = run(driver)

    class Killed(BaseException):
        pass

    def suggest(self: Space, trial: optuna.Trial) -> dict[str, Any]:
        next(iter(self)).suggest(trial)
        raise Killed

    with study(tmp_path / "parts", default=default) as driver:
        drawn = run(driver, number)
        with monkeypatch.context() as patch:
            patch.setattr(Space, "suggest", suggest)
            patch.setattr(StudyDriver, "_set", lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                driver.ask()
    with study(tmp_path / "parts", default=default) as driver:
        drawn += run(driver)
        assert [record.number for record in driver.records()] == list(range(12))
    assert drawn == whole


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"space": SPACE | {"x": {"int": [1, 2]}}}, "space"),
        ({"objectives": {"val/dice": "min"}}, "study.objectives"),
        ({"seed": 1}, "study.seed"),
        ({"sampler": "random"}, "study.sampler"),
    ],
)
def test_another_study_in_the_folder_is_refused(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    study(tmp_path).close()
    with pytest.raises(StudyError, match=f"another {part}"):
        study(tmp_path, **changes)
    study(tmp_path, trials=99, name="renamed").close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with study(tmp_path), pytest.raises(StudyError, match="another process"):
        study(tmp_path)
    study(tmp_path).close()


def test_a_closed_study_is_one_file_that_optuna_opens(tmp_path: Path) -> None:
    folder = tmp_path / "stüdy ?#%41 'x'"
    with study(folder) as driver:
        run(driver, 5)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == ["study.db", "trials"]
    (folder / "study.db").rename(tmp_path / "moved.db")
    loaded = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'moved.db'}")
    assert len(loaded.trials) == 5 and loaded.metric_names == ["val/dice"]


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to look at" * 10])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.db").write_bytes(content)
    if content:
        with pytest.raises(StudyError, match="can't be opened"):
            study(tmp_path)
    else:
        study(tmp_path).close()  # killed before the first page was written: an empty file is a new study


def test_the_time_spent_adds_up(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        driver._opened -= 100.0
        run(driver, 1)
    with study(tmp_path) as driver:
        assert driver.spent == pytest.approx(100.0, abs=10.0)


# Limits -------------------------------------------------------------------------------------------------------------


def limited(latency: float = 50.0, **others: float) -> dict[str, Any]:
    return {"limits": {"latency_ms": latency} | others}


def slow(params: Mapping[str, Any]) -> float:
    """By what share of it a trial breaks a limit: two thirds of the space do, and the best values lie there."""
    return params["optim.lr"] / 5e-4 - 1.0


def finish_constrained(driver: StudyDriver, task: TrialTask) -> None:
    value, costs = score(task.params), {"latency_ms": 50.0 * (1.0 + slow(task.params)), "size_mb": 4.0}
    metrics = {"val/dice": value, "latency_ms": 10 * value * value}
    driver.report(task.number, 1, 1 / 9, metrics, costs=costs)
    driver.complete(task.number, TrialOutcome(metrics=metrics, costs=costs))


@pytest.mark.parametrize("objectives", [{"val/dice": "max"}, {"val/dice": "max", "latency_ms": "min"}], ids=len)
@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_learn_to_keep_a_limit(tmp_path: Path, sampler: str, objectives: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"sampler": sampler, "trials": 60, "space": NUMERIC, "default": {"optim.lr": 0.5}}
    with study(tmp_path, objectives=objectives, select=limited(), **settings) as driver:
        while (task := driver.ask()) is not None:
            finish_constrained(driver, task)
        kept = [record.feasible for record in driver.records()[1:]]
        assert sum(kept[-20:]) > 12, "by chance 7 would"
        stored = optuna.load_study(study_name=None, storage=driver._study._storage).trials[1]
        assert stored.constraints == {"latency_ms": pytest.approx(slow(driver.record(1).params))}
        assert driver.best() is not None and all(record.feasible for record in driver.front())
        assert driver.table()[0].feasible


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_resumed_study_with_limits_draws_what_it_would_have(tmp_path: Path, sampler: str) -> None:
    settings: dict[str, Any] = {
        "sampler": sampler,
        "trials": 16,
        "objectives": {"val/dice": "max", "latency_ms": "min"},
        "select": limited(),
    }
    drawn: dict[str, list[Any]] = {"whole": [], "parts": []}
    for name, stops in (("whole", [99]), ("parts", [3, 5, 99])):
        for stop in stops:
            with study(tmp_path / name, **settings) as driver:
                count = 0
                while count < stop and (task := driver.ask()) is not None:
                    drawn[name].append(task.params)
                    finish_constrained(driver, task)
                    count += 1
                if task := driver.ask():  # and dies with it under way, its limits known already
                    driver.report(task.number, 1, 0.05, {"val/dice": 0.1}, costs={"latency_ms": 75.0})
    assert drawn["parts"] == drawn["whole"] and len(drawn["whole"]) == 16


def test_a_refused_trial_is_stored_and_another_one_comes_in_its_place(tmp_path: Path) -> None:
    refusal = TrialOutcome(
        metrics={"latency_ms": 90.0},
        stopped="refused",
        costs={"latency_ms": 90.0},
        extras={"refused": ["latency_ms"]},
    )
    with study(tmp_path, trials=4, select=limited()) as driver:
        run(driver, 2)
        for _ in range(2):
            task = driver.ask()
            assert task is not None
            driver.complete(task.number, refusal)
        record = driver.record(2)
        assert (record.state, record.stopped, record.values, record.feasible) == ("pruned", "refused", None, False)
    with study(tmp_path, trials=4, select=limited()) as driver:
        assert len(run(driver)) == 2, "four were wanted, and two of them were refused"
    with study(tmp_path / "all", trials=3) as driver:
        run(driver, 1)
        asked = 0
        while (task := driver.ask()) is not None:
            driver.complete(task.number, refusal)
            asked += 1
        assert asked == 8, "but not for ever"


def test_under_other_limits_what_is_stored_follows_from_what_trials_cost(tmp_path: Path) -> None:
    """Of trials that completed, were stopped, refused, or lie unfinished: also to Optuna's own reader."""

    def stored() -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
        trials = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}").trials
        rest = [{k: v for k, v in t.system_attrs.items() if not k.startswith("constraints:")} for t in trials]
        return [trial.constraints for trial in trials], rest

    settings: dict[str, Any] = {"sampler": "nsga2", "trials": 8}
    with study(tmp_path, select=limited(50.0), **settings) as driver:
        for latency, size in ((40.0, 4.0), (60.0, 4.0), (80.0, 2.0), (20.0, 9.0), (math.nan, 1.0)):
            task = driver.ask()
            assert task is not None
            costs = {"latency_ms": latency, "size_mb": size}
            if task.number == 2:
                driver.complete(2, TrialOutcome(metrics={}, stopped="refused", costs=costs))
                continue
            driver.report(task.number, 1, 1 / 9, {"val/dice": 0.1}, costs=costs)
            if task.number == 3:
                driver.prune(3)
            elif task.number < 3:
                driver.complete(task.number, TrialOutcome(metrics={"val/dice": 0.2}, costs=costs))
    before, others = stored()
    assert before == [{"latency_ms": -0.2}, {"latency_ms": 0.2}, {"latency_ms": 0.6}, {"latency_ms": -0.6}, {}]
    with study(tmp_path, select=limited(80.0, size_mb=3.0), **settings) as driver:
        assert [record.feasible for record in driver.records()] == [False, False, True, False, True]
        found = [record.constraints for record in driver.records()]
    assert found == [
        {"latency_ms": -0.5, "size_mb": pytest.approx(1 / 3)}, {"latency_ms": -0.25, "size_mb": pytest.approx(1 / 3)},
        {"latency_ms": 0.0, "size_mb": pytest.approx(-1 / 3)}, {"latency_ms": -0.75, "size_mb": 2.0},
        {"size_mb": pytest.approx(-2 / 3)},
    ]  # fmt: skip
    assert stored() == (found, others), "nothing else has changed"
    with study(tmp_path, **settings) as driver:
        assert all(not record.constraints for record in driver.records())
    assert stored() == ([{}] * 5, others)
    with study(tmp_path, select=limited(50.0), **settings):
        assert stored() == (before, others)


def test_under_other_limits_a_study_draws_as_one_that_always_had_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sampler": "tpe", "trials": 40, "space": NUMERIC, "default": {"optim.lr": 0.5}}
    drawn: dict[str, list[Any]] = {}
    for name, first, then in (("changed", 500.0, 50.0), ("always", 50.0, 50.0), ("never", 500.0, 500.0)):
        with study(tmp_path / name, select=limited(first), **settings) as driver:
            for _ in range(10):  # at random
                task = driver.ask()
                assert task is not None
                finish_constrained(driver, task)
        with study(tmp_path / name, select=limited(then), **settings) as driver:
            drawn[name] = []
            for _ in range(6):
                task = driver.ask()
                assert task is not None
                drawn[name].append(task.params)
                finish_constrained(driver, task)
    assert drawn["changed"] == drawn["always"] != drawn["never"]


def test_at_a_rung_a_trial_that_breaks_a_limit_stands_behind_all_that_keep_them(tmp_path: Path) -> None:
    objectives = {"val/dice": "max", "latency_ms": "min"}
    with study(tmp_path, objectives=objectives, pruner="asha", select=limited()) as driver:
        tasks = [task for _ in range(4) if (task := driver.ask())]
        for task, dice, latency in zip(tasks, (0.2, 0.9, 0.5, 0.95), (10.0, 40.0, 20.0, 99.0), strict=True):
            costs = {"latency_ms": latency}
            stop = driver.report(task.number, 1, 1 / 9, {"val/dice": dice, "latency_ms": latency}, costs=costs)
            # None of the first three beats another in both; the fourth is the most accurate, and too slow.
            assert stop == (latency > 50)


def test_at_a_rung_the_fronts_are_counted_over_all_objectives_that_are_known(tmp_path: Path) -> None:
    with study(tmp_path, objectives={"val/dice": "max", "latency_ms": "min"}, pruner="asha") as driver:
        tasks = [task for _ in range(4) if (task := driver.ask())]
        told = []
        for task, dice, latency in zip(tasks, (0.5, 0.6, 0.4, 0.55), (10.0, 20.0, 9.0, 25.0), strict=True):
            told.append(driver.report(task.number, 1, 1 / 9, {"val/dice": dice, "latency_ms": latency}))
        assert told == [False, False, False, True], "the last is beaten in both by the second"


def test_the_default_is_never_pruned(tmp_path: Path) -> None:
    with study(tmp_path, pruner="asha") as driver:
        default, other = driver.ask(), driver.ask()
        assert default is not None and other is not None
        assert not driver.report(other.number, 1, 0.2, {"val/dice": 1.0})
        assert not driver.report(default.number, 1, 0.2, {"val/dice": 0.0})


def test_several_objectives(tmp_path: Path) -> None:
    objectives = {"val/dice": "max", "latency_ms": "min"}
    with study(tmp_path, objectives=objectives, pruner="asha", trials=20) as driver:
        run(driver)
        states = driver.counts()
        assert states["pruned"] > 0 and states["completed"] > 0 and states["failed"] == 0
        pruned = next(t for t in driver._study.trials if t.state == optuna.trial.TrialState.PRUNED)
        assert pruned.user_attrs["history"], "its values are kept although Optuna's report() would raise"
        front = driver.front()
        best = driver.best()
        assert best is not None and best.number in {record.number for record in front}
        assert driver.hypervolume((-5.0, 100.0)) > 0
        assert [record.state for record in driver.table()][: len(front)] == ["completed"] * len(front)


def test_a_failure_is_kept_and_the_study_goes_on(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        run(driver, 1)
        task = driver.ask()
        assert task is not None
        driver.fail(task.number, "Traceback …\nValueError: boom")
        assert (task.directory / "error.txt").read_text(encoding="utf-8").endswith("boom")
        assert driver.fatal is None and len(run(driver)) == 10
        assert driver.record(task.number).state == "failed" and "boom" in str(driver.record(task.number).error)
        assert driver.table()[-1].number == task.number


def test_a_default_that_fails_ends_the_study_until_it_is_resumed(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        task = driver.ask()
        assert task is not None
        driver.fail(0, "no space left on device")
        assert driver.fatal is not None and "no space left" in driver.fatal and driver.ask() is None
        assert driver.record(0).state == "failed"
    with study(tmp_path) as driver:
        assert driver.fatal is None
        assert len(run(driver)) == 12 and driver.record(0).state == "completed"


def test_nothing_but_failures_ends_the_study(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        tasks = [driver.ask() for _ in range(4)]
        for task in tasks[1:3]:
            assert task is not None
            driver.fail(task.number, "boom")
        assert driver.fatal is None
        assert tasks[3] is not None
        driver.fail(tasks[3].number, "the third boom")
        assert driver.fatal is not None and "the third boom" in driver.fatal and not driver.has_next


@pytest.mark.parametrize("metrics", [{}, {"val/dice": float("nan")}, {"val/dice": float("inf")}, {"val/loss": 1.0}])
def test_an_outcome_without_its_objective_is_a_failure(tmp_path: Path, metrics: dict[str, float]) -> None:
    with study(tmp_path) as driver:
        run(driver, 1)
        task = driver.ask()
        assert task is not None
        driver.complete(task.number, TrialOutcome(metrics=metrics))
        assert driver.record(task.number).state == "failed"
        assert "val/dice" in (task.directory / "error.txt").read_text(encoding="utf-8")


def test_a_trial_that_the_deadline_cut_is_pruned(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        run(driver, 1)
        task = driver.ask()
        assert task is not None
        driver.report(task.number, 1, 0.4, {"val/dice": 0.3})
        driver.complete(task.number, TrialOutcome(metrics={"val/dice": 0.3}, seconds=2.0, stopped="deadline"))
        record = driver.record(task.number)
        assert (record.state, record.stopped, record.seconds) == ("pruned", "deadline", 2.0)


def test_each_trial_ends_once(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        run(driver, 1)
        for end in (lambda: driver.prune(0), lambda: driver.fail(0, "x"), lambda: driver.report(5, 1, 0.1, {})):
            with pytest.raises(StudyError, match="not running"):
                end()


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_outside_its_range(tmp_path: Path, fraction: float) -> None:
    with study(tmp_path) as driver:
        driver.ask()
        with pytest.raises(StudyError, match=r"within 0\.\.1"):
            driver.report(0, 1, fraction, {"val/dice": 1.0})


# Choosing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "tpe"),
        ({"trials": 1000}, "tpe"),
        ({"trials": 1000, "space": NUMERIC}, "cmaes"),
        ({"trials": 1000, "objectives": {"a": "max", "b": "min"}}, "nsga2"),
        ({"objectives": {"a": "max", "b": "min"}}, "tpe"),
        ({"sampler": "random"}, "random"),
    ],
)
def test_the_sampler_that_auto_stands_for(tmp_path: Path, changes: dict[str, Any], chosen: str) -> None:
    with study(tmp_path, **changes) as driver:
        assert driver.sampler_name == chosen


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sampler": "cmaes"}, "at least two float or int"),
        ({"sampler": "cmaes", "space": NUMERIC, "objectives": {"a": "max", "b": "min"}}, "knows one objective"),
        ({"space": {}}, "space is empty"),
    ],
)
def test_what_a_sampler_cannot_do(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StudyError, match=complaint):
        study(tmp_path, **changes)


def better_than_random(folder: Callable[[str], Path], sampler: str) -> float:
    def best(name: str) -> float:
        with study(folder(name), space=NUMERIC, default={"optim.lr": 0.5}, sampler=name, trials=40) as driver:
            run(driver)
            record = driver.best()
            assert record is not None and record.values is not None
            return record.values[0]

    return best(sampler) - best("random")


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_the_sampler_learns(tmp_path: Path, sampler: str) -> None:
    assert better_than_random(lambda name: tmp_path / name, sampler) > 0


# Importance ---------------------------------------------------------------------------------------------------------


def test_importance_finds_what_matters(tmp_path: Path) -> None:
    with study(tmp_path, space=NUMERIC, default={"optim.lr": 0.5}, sampler="random", trials=40) as driver:
        run(driver)
        importance = driver.importance()
    assert importance.method == "fanova" and importance.trials == 39
    assert next(iter(importance.shares)) == "optim.lr" and importance.shares["optim.lr"] > 0.6
    assert sum(importance.shares.values()) == pytest.approx(1.0)


def test_importance_of_few_trials_is_empty_and_says_why(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        assert driver.importance().shares == {}
        run(driver, 4)
        importance = driver.importance()
    assert importance.shares == {} and "at least 8" in importance.note


def test_importance_with_early_stops_and_conditions_uses_the_first_rung(tmp_path: Path) -> None:
    with study(tmp_path, pruner="asha", trials=20, sampler="random") as driver:
        run(driver)
        assert driver.counts()["completed"] < 8
        importance = driver.importance()
    assert importance.shares and "11% of the schedule" in importance.note
    assert importance.shares["optim.lr"] == max(importance.shares.values())


def test_what_was_lost_with_a_machine_is_remembered(tmp_path: Path) -> None:
    with study(tmp_path) as driver:
        task = driver.ask()
        assert task is not None
        driver.lose(task.number, "10.0.0.2")
    with study(tmp_path) as driver:
        assert driver.ask() is not None
        driver.lose(0, "10.0.0.3")
        driver.complete(0, TrialOutcome(metrics={"val/dice": 0.5}))
        assert driver.record(0).losses == ("10.0.0.2", "10.0.0.3")
        with pytest.raises(StudyError, match="not running"):
            driver.lose(0, "10.0.0.2")
