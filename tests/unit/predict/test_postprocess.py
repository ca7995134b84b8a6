from __future__ import annotations

import numpy as np
import pytest

from medray.predict.postprocess import fit_thresholds, keep_largest


def test_the_largest_component_of_each_class_stays():
    labels = np.zeros((10, 10), dtype=np.uint8)
    labels[0:3, 0:3], labels[5, 5], labels[8:, 8:], labels[0, 9] = 1, 1, 2, 2
    found = keep_largest(labels, 4)
    assert found[5, 5] == 0 and found[0, 9] == 0
    assert (found == 1).sum() == 9 and (found == 2).sum() == 4
    assert labels[5, 5] == 1, "the input is left as it was"


def test_corners_do_not_connect():
    labels = np.zeros((4, 4), dtype=np.uint8)
    labels[0, 0] = labels[1, 1] = labels[1, 2] = 1
    assert keep_largest(labels, 2)[0, 0] == 0


def test_thresholds_have_the_largest_youden_index():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (400, 2))
    score = np.clip(truth * 0.2 + rng.random((400, 2)) * 0.5, 0, 1)
    cuts = fit_thresholds(score, truth)

    def youden(column, cut):
        called = score[:, column] >= cut
        return called[truth[:, column] == 1].mean() - called[truth[:, column] == 0].mean()

    for column, cut in enumerate(cuts):
        assert youden(column, cut) == pytest.approx(max(youden(column, c) for c in np.linspace(0, 1, 2001)), abs=0.01)


def test_a_label_with_one_side_only_is_cut_at_half():
    assert fit_thresholds(np.array([[0.2], [0.3]]), np.array([[1], [1]])) == (0.5,)
    assert fit_thresholds(np.array([[0.2], [0.3]]), np.array([[255], [1]])) == (0.5,)
