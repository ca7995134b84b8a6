from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medray.search import pareto

POINTS = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.lists(st.integers(0, 6), min_size=m, max_size=m), min_size=1, max_size=12)
)


@given(POINTS)
def test_ranks_peel_fronts(points: list[list[int]]) -> None:
    array = np.asarray(points, dtype=float)
    ranks = pareto.non_dominated_rank(array)
    for i, a in enumerate(array):
        dominators = [j for j, b in enumerate(array) if (b <= a).all() and (b < a).any()]
        assert ranks[i] == (max(ranks[j] for j in dominators) + 1 if dominators else 0)


@given(POINTS)
def test_hypervolume_counts_the_cells_below_the_reference(points: list[list[int]]) -> None:
    array = np.asarray(points, dtype=float)
    grid = np.stack(np.meshgrid(*[np.arange(5)] * array.shape[1], indexing="ij"), axis=-1).reshape(-1, array.shape[1])
    covered = (grid[:, None, :] >= array[None]).all(axis=2).any(axis=1).sum()
    assert pareto.hypervolume(array, [5.0] * array.shape[1]) == pytest.approx(covered)


def test_losses_turn_max_round_and_make_nan_the_worst() -> None:
    got = pareto.losses([(0.9, 10.0), (float("nan"), 5.0)], ["max", "min"])
    assert got.tolist() == [[-0.9, 10.0], [np.inf, 5.0]]


def test_the_knee_is_the_balanced_point() -> None:
    assert pareto.knee(np.array([[0.0, 100.0], [0.1, 10.0], [1.0, 0.0], [1.0, 100.0]])) == 1


def test_nothing_has_no_front_and_no_volume() -> None:
    nothing = np.empty((0, 2))
    assert pareto.front(nothing) == []
    assert pareto.hypervolume(nothing, [1.0, 1.0]) == 0.0


def test_distances_scale_each_loss_over_the_front_of_the_reference() -> None:
    reference = np.array([[0.0, 100.0], [1.0, 0.0], [5.0, 500.0]])
    assert pareto.distances(np.array([[0.0, 0.0], [1.0, 100.0], [0.5, 0.0]]), reference).tolist() == [0.0, 2**0.5, 0.5]
    assert pareto.distances(np.array([[1.0, np.inf]]), np.array([[1.0, np.inf]])).tolist() == [np.inf]


def test_the_hypervolume_grows_with_each_trial_and_ignores_what_is_not_finite() -> None:
    points = np.array([[1.0, 0.0], [0.0, 1.0], [np.inf, np.inf], [0.0, 0.0], [1.0, 1.0]])
    volumes = pareto.normalised_hypervolume(points)
    assert (np.diff(volumes) >= 0).all() and volumes[1] == volumes[2]
    # Of the box from 0 to 1.1: first the strip above (1, 0), last all of it.
    assert volumes[0] == pytest.approx(0.1 * 1.1 / 1.21) and volumes[3] == pytest.approx(1.0)
    assert pareto.normalised_hypervolume(np.full((2, 2), np.inf)).tolist() == [0.0, 0.0]
