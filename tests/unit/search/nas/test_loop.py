"""The search's loop: it ends, it resumes, and it refuses what is not its own."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch

from medray.config.schema import NasConfig
from medray.errors import ConfigError, NonFiniteLossError, StudyError
from medray.search.nas import loop
from medray.search.nas.draw import random_genotype
from medray.search.nas.loop import load_found, search
from medray.search.nas.strategies import STRATEGIES, strategy
from medray.search.nas.strategy import Problem
from medray.train.runtime import LocalRuntime


class Loader:
    """Three batches an epoch; each says which it is."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 3

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([{"number": torch.tensor(3 * self.epoch + position)} for position in range(3)])


class Recorder:
    """A strategy that notes what it is handed."""

    def __init__(self, problem, *, fails=None, value=1.0):
        self.seen, self.fails, self.value = [], fails, value

    def step(self, train, held, progress):
        if len(self.seen) == self.fails:
            raise KeyboardInterrupt
        assert int(train["number"]) == int(held["number"])
        self.seen.append(int(train["number"]))
        return {"loss": self.value}

    def finish(self, held):
        return (random_genotype("classification", 2, 1), random_genotype("classification", 2, 2))

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


PROBLEM = Problem(
    net=None, criterion=None, runtime=LocalRuntime(), precision="fp32", config=NasConfig(strategy="darts"), seed=1
)


def run(directory, made, *, asked="a", steps=8, seconds=1e6):
    return search(
        PROBLEM, lambda _: made, train=Loader(), held=Loader(), directory=directory, asked=asked, seconds=seconds,
        steps=steps,
    )  # fmt: skip


def test_it_ends_after_its_steps_and_is_read_back(tmp_path):
    made = Recorder(PROBLEM)
    found = run(tmp_path, made)
    assert made.seen == list(range(8)) and found.steps == 8
    assert load_found(tmp_path).genotypes == found.genotypes
    assert json.loads((tmp_path / "genotype.json").read_text())["kind"] == "classification"


def test_it_ends_when_the_time_does(tmp_path, monkeypatch):
    ticks = count()
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(ticks)))
    assert 1 <= run(tmp_path, Recorder(PROBLEM), steps=None, seconds=40).steps < 40


def test_an_interrupted_search_goes_on_with_the_batch_that_comes_next(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Recorder(PROBLEM, fails=5))
    made = Recorder(PROBLEM)
    assert run(tmp_path, made).steps == 8 and made.seen == list(range(8))
    with pytest.raises(StudyError, match="another architecture search"):
        run(tmp_path, Recorder(PROBLEM), asked="b")


def test_the_history_stays_short(tmp_path):
    found = run(tmp_path, Recorder(PROBLEM), steps=700)
    assert len(found.history) <= loop.ROWS and found.history[-1]["step"] >= 690


def test_what_diverges_or_is_damaged_is_said(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"study\.nas\.architecture_lr"):
        run(tmp_path, Recorder(PROBLEM, value=float("nan")))
    assert load_found(tmp_path) is None
    for text in ("{", "{}", '{"genotypes": [], "steps": 1, "seconds": 1, "history": []}',
                 '{"genotypes": ["unet"], "steps": 1, "seconds": 1, "history": []}'):  # fmt: skip
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(StudyError, match="damaged"):
            load_found(tmp_path)


def test_an_unknown_strategy_gets_the_nearest():
    assert strategy("darts") is STRATEGIES["darts"]
    with pytest.raises(ConfigError, match=r"Did you mean 'darts'.*enas"):
        strategy("dart")
