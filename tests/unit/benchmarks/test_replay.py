"""The simulator of recorded searches: its clock, its strategies, the choice on other tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest

from benchmarks import replay
from benchmarks._replay_strategies import Ours, default_of, simulate, space_of
from benchmarks._replay_tables import LR, VALIDATIONS, Curve, Table
from medray.search.space import Space

WIDTHS, LOSSES = (4, 8), ("dice_ce", "tversky")


def table(best_lr: float = 1e-3) -> Table:
    """Values rise with the schedule, most at one rate; the wide network takes twice the time."""
    curves = {}
    for point in product(LR, WIDTHS, LOSSES):
        top = 0.9 - 0.1 * abs(math.log10(point[0] / best_lr)) + (0.02 if point[2] == "tversky" else 0.0)
        values = tuple(top * (place + 1) / VALIDATIONS for place in range(VALIDATIONS))
        seconds = tuple((place + 1) * point[1] / 4 for place in range(VALIDATIONS))
        curves[point] = Curve(params=point, seconds=seconds, values=values)
    grid: dict[str, tuple[Any, ...]] = {"optim.lr": LR, "model.feature_size": WIDTHS, "loss.name": LOSSES}
    return Table(name="toy", objective="val/dice", grid=grid, default=(1e-4, 4, "dice_ce"), curves=curves)


class Fixed:
    """Trials in a given order, each stopped after so many validations."""

    def __init__(self, points: list[tuple[Any, ...]], stop: int = VALIDATIONS) -> None:
        self.points, self.stop, self.told = points, stop, list[tuple[int, int]]()
        self.ended: list[tuple[int, float, bool]] = []
        self.asked = 0

    def ask(self) -> tuple[int, Mapping[str, Any]] | None:
        if self.asked == len(self.points):
            return None
        self.asked += 1
        return self.asked - 1, dict(zip(table().grid, self.points[self.asked - 1], strict=True))

    def report(self, number: int, step: int, value: float) -> bool:
        self.told.append((number, step))
        return step == self.stop < VALIDATIONS

    def end(self, number: int, values: tuple[float, ...], *, seconds: float, stopped: bool) -> None:
        self.ended.append((number, seconds, stopped))
        assert len(values) == (self.stop if stopped else VALIDATIONS)

    def close(self) -> None:
        self.asked = -1


def test_the_clock_is_the_recordings() -> None:
    slow, quick, best = (1e-4, 8, "dice_ce"), (1e-4, 4, "dice_ce"), (1e-3, 4, "tversky")
    found = table()
    # one slot: 18 s, then 9 s, then the best reaches its last validation after 9 s more
    assert simulate(Fixed([slow, quick, best]), found, found.best, slots=1) == 18 + 9 + 9
    # two slots: the best begins when the quick one has ended
    strategy = Fixed([slow, quick, best])
    assert simulate(strategy, found, found.best, slots=2) == 9 + 9
    assert strategy.ended == [(1, 9.0, False), (0, 18.0, False)] and strategy.asked == -1
    # what is stopped frees its slot at once
    strategy = Fixed([slow, quick, best, best], stop=2)
    simulate(strategy, found, found.best, slots=1)
    assert strategy.ended[:2] == [(0, 4.0, True), (1, 2.0, True)]


def test_who_never_gets_there_took_the_whole_grid() -> None:
    found = table()
    assert simulate(Fixed([(1e-4, 4, "dice_ce")]), found, found.best, slots=2) == found.seconds / 2


def test_a_proposal_is_the_recorded_point_beside_it() -> None:
    found = table()
    near = found.nearest({"optim.lr": 1.7e-3, "model.feature_size": 5.5, "loss.name": "tversky"})
    assert near.params == (1e-3, 4, "tversky")  # 1.7e-3 is nearer to 1e-3 than to 3e-3 by ratio
    space = Space.parse(space_of(found))
    assert space.contains(default_of(found))


@pytest.mark.parametrize("name", list(replay.VARIANTS))
def test_every_strategy_finds_the_best_and_again_in_the_same_time(name: str) -> None:
    found = table()
    make = next(iter(replay.VARIANTS[name].values()))
    goal = 0.97 * found.best
    first = simulate(make(found, 7), found, goal)
    assert 0 < first < found.seconds / 4
    assert simulate(make(found, 7), found, goal) == first


def test_settings_are_chosen_by_what_is_quick_on_the_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "lost": lambda _table, _seed: Fixed([(1e-4, 4, "dice_ce")]),
        "found": lambda _table, _seed: Fixed([(1e-3, 4, "tversky")]),
    }
    tables = {"a": table(), "b": table(), "c": table(best_lr=1e-4)}
    monkeypatch.setattr(replay, "VARIANTS", {"one": found, "other": {"": found["lost"]}})
    monkeypatch.setattr(replay, "_table", tables.__getitem__)
    monkeypatch.setattr(replay, "replayed", lambda jobs: {job: replay.replay_one(job) for job in jobs})
    assert replay._choices(list(tables), range(2)) == [
        ("one", "found", "a"), ("one", "found", "b"), ("one", "found", "c"),
        ("other", "", "a"), ("other", "", "b"), ("other", "", "c"),
    ]  # fmt: skip
    times = {"steady": [np.asarray([4.0, 4.0]), np.asarray([4.0])], "odd": [np.asarray([1.0]), np.asarray([32.0])]}
    assert replay.choose(times) == "steady", "4 against the root of 32"


def test_processes_replay_what_one_would() -> None:
    jobs: list[replay.Job] = [("random", "", "segmentation3d", seed) for seed in (0, 1, 0)]
    assert replay.replayed(jobs) == {job: replay.replay_one(job) for job in jobs[:2]}


def test_ours_stops_what_is_hopeless() -> None:
    found = table()
    strategy, stopped = Ours(found, 0, pruner="asha", sampler="tpe"), []
    end = strategy.end

    def watched(number: int, values: tuple[float, ...], *, seconds: float, stopped: bool) -> None:
        seen.append(stopped)
        end(number, values, seconds=seconds, stopped=stopped)

    seen = stopped
    strategy.end = watched  # type: ignore[method-assign]
    simulate(strategy, found, 2.0, slots=16)
    assert any(seen) and not all(seen)
