"""Groups that Ray Train brings up: the same result, lost processes, errors, and a study whose trials are groups."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from medray.config.schema import StudyConfig
from medray.engines.ray.train import GroupSize, _Failure, run_group
from medray.engines.ray.tune import run_trials
from medray.errors import OutOfMemoryError, TrainingError, UnreadableError
from medray.search.driver import StudyDriver
from medray.search.space import Space
from medray.search.trial import Report, TrialOutcome, TrialTask
from medray.train.progress import Progress
from medray.train.runtime import Runtime
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.study import tune
from medray.workflows.training import Trained, train_model

PAIR = GroupSize(workers=2)
PLAIN = {
    "device": "cpu",
    "augment": {"strength": 0.0},
    "model": {"name": "small_cnn", "feature_size": 8, "depth": 3, "dropout": 0.0},
    "optim": {"name": "sgd", "lr": 0.005},
    "train": {"batch_size": 6, "epochs": 12, "validate_every": 1, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("together")
    prepare_directory("phantom://xray-nodules?cases=40&size=32", folder)
    return Recipe(directory=str(folder), explicit=PLAIN, cache=str(folder / "cache"))


def together(recipe: Recipe, folder: Path, **options: Any) -> Trained:
    return train_model(recipe, recipe.experiment({"train.workers": 2}), folder, cpus=2, **options)


def workers() -> list[psutil.Process]:
    """The group's processes, rank 0 first, as Ray titles them while they train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def test_a_lost_process_costs_nothing_and_a_stop_is_heard(ray_session: None, recipe: Recipe, tmp_path: Path) -> None:
    """Rank 0 gets SIGKILL after some validations: the group comes back by itself and goes on as it would have.

    The rows are those of a group that nobody disturbed, to the last bit. (That a group does what one process does,
    test_group shows, in float64: in fp32 rounding grows from step to step, on some processors to percents in epochs.
    benchmarks/faults.py kills everyone, many times.)
    """
    killed: list[int] = []

    def watch(progress: Progress) -> bool:
        if progress.epoch == 4 and not killed:
            process = workers()[0]
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        return progress.epoch >= 9

    calm = together(recipe, tmp_path / "calm", on_validation=lambda progress: progress.epoch >= 9)
    found = together(recipe, tmp_path / "disturbed", on_validation=watch)
    assert killed and (found.fit.stopped, found.fit.epochs) == ("pruned", 9)
    for mine, theirs in zip(found.fit.history, calm.fit.history, strict=True):
        assert all(mine[key] == theirs[key] for key in ("epoch", "step", "loss", "val/auc"))


def fails_by_our_own_error(task: Any, runtime: Runtime, report: Callable[[Progress], bool]) -> None:
    _count(task)
    if runtime.is_main:
        raise UnreadableError("scan.nii.gz", "it ends too soon")
    runtime.agree(False)  # waits for one that never comes


def _count(folder: Path) -> None:
    (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()


def test_an_error_reaches_the_user_as_it_was_raised_and_is_not_tried_again(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"scan.nii.gz: it ends too soon"):
        run_group(fails_by_our_own_error, tmp_path, PAIR)
    assert len(list(tmp_path.iterdir())) <= 2  # one of them may have heard of it before it began


def test_an_error_travels_whole() -> None:
    """Exceptions with arguments of their own don't survive being pickled; those that aren't ours bring their trace."""
    try:
        raise ZeroDivisionError("the cause")
    except ZeroDivisionError as error:
        found = _Failure.of(error).revive()
    assert (
        isinstance(found, TrainingError) and "test_an_error_travels_whole" in str(found) and "the cause" in str(found)
    )
    error = OutOfMemoryError("4 samples do not fit")
    error.micro_batch = 2
    again = _Failure.of(error).revive()
    assert isinstance(again, OutOfMemoryError) and (again.micro_batch, str(again)) == (2, str(error))


def test_a_group_that_dies_too_often_says_so(ray_session: None, tmp_path: Path) -> None:
    def keep_killing(stop: threading.Event) -> None:
        while not stop.wait(0.2):
            for process in workers():
                process.kill()

    stop = threading.Event()
    thread = threading.Thread(target=keep_killing, args=(stop,))
    thread.start()
    try:
        with pytest.raises(TrainingError, match="lost more than 1 times"):
            run_group(waits, tmp_path, PAIR, failures=1)
    finally:
        stop.set()
        thread.join()


def waits(task: Any, runtime: Runtime, report: Callable[[Progress], bool]) -> None:
    time.sleep(60)


def leads(task: TrialTask, report: Report) -> TrialOutcome:
    """A trial that only waits for its group."""
    run_group(meets, task.directory, PAIR)
    found = sorted(path.name for path in task.directory.glob("rank-*"))
    return TrialOutcome(metrics={"val/dice": float(len(found))}, extras={"found": found})


def meets(task: Any, runtime: Runtime, report: Callable[[Progress], bool]) -> None:
    (task / f"rank-{runtime.lane}").touch()
    runtime.agree(True)


def test_a_trial_may_lead_a_group_that_takes_every_core(ray_session: None, tmp_path: Path) -> None:
    """It holds none of them itself: with one it would wait for its own group for ever."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        space = Space.parse({"optim.lr": {"float": [1e-4, 1e-2], "log": True}})
        config = StudyConfig(trials=1, pruner="none")
        with StudyDriver(space, config, {"val/dice": "max"}, tmp_path, {"optim.lr": 1e-3}) as driver:
            run_trials(driver, leads, directory=tmp_path, cpus_per_trial=2, concurrency=1, in_group=True)
            (record,) = driver.records()
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert record.values == (2.0,)


def test_the_final_fit_of_a_study_may_be_a_groups(ray_session: None, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(
        "data: phantom://xray-nodules?cases=40&size=32\n"
        "model: {name: small_cnn, feature_size: 8, depth: 3}\n"
        "train: {epochs: 1, batch_size: 6}\n"
        "study: {name: groups, budget: 10min, trials: 1, workers_per_trial: 2, ensemble: false}\n",
        encoding="utf-8",
    )
    result = tune(space, runs=tmp_path)
    assert result.report.is_file() and (result.bundle / "bundle.json").is_file()
    assert "workers: 2" in (tmp_path / "groups" / "final" / "default" / "experiment.yaml").read_text(encoding="utf-8")
