from __future__ import annotations

import numpy as np
import pytest

from medray.errors import ModelError
from medray.learn.activations import sigmoid, softmax
from medray.predict.calibration import HIGHEST, LOWEST, fit_temperature, sample_voxels, temper
from medray.predict.predictor import probabilities


def draw(p, rng):
    return (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(true_temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3.0, size=(20_000, 4))
    labels = draw(softmax(logits / true_temperature), rng)
    assert fit_temperature(logits, labels, "classification") == pytest.approx(true_temperature, rel=0.05)


def test_multilabel_and_ignored_targets():
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3.0, size=(20_000, 3))
    truth = (rng.random(logits.shape) < sigmoid(logits / 2.0)).astype(np.int64)
    truth[:5000] = 255
    assert fit_temperature(logits, truth, "multilabel") == pytest.approx(2.0, rel=0.05)


def test_it_agrees_with_a_search_by_scipy():
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(2)
    logits, labels = rng.normal(scale=2.0, size=(300, 3)), rng.integers(0, 3, 300)

    def nll(t):
        return -np.log(softmax(logits / t)[np.arange(300), labels]).mean()

    best = minimize_scalar(nll, bounds=(LOWEST, HIGHEST), method="bounded").x
    found = fit_temperature(logits, labels, "classification")
    assert nll(found) <= nll(best) + 1e-6


def test_bounds_and_nothing_to_learn():
    logits = np.array([[5.0, -5.0], [-5.0, 5.0]])
    assert fit_temperature(logits, np.array([0, 1]), "classification") == LOWEST
    assert fit_temperature(logits, np.array([1, 0]), "classification") == HIGHEST
    assert fit_temperature(logits, np.array([255, 255]), "classification") == 1.0
    with pytest.raises(ModelError, match="takes"):
        fit_temperature(logits, np.array([0]), "classification")
    with pytest.raises(ModelError, match="not finite"):
        fit_temperature(np.array([[np.nan, 0.0]]), np.array([0]), "classification")


def test_tempering_probabilities_is_tempering_logits():
    logits = np.random.default_rng(3).normal(size=(1, 3, 6, 5)).astype(np.float32) * 3
    plain = softmax(logits)[0]
    tempered = temper(plain, 2.5)
    np.testing.assert_allclose(tempered, softmax(logits / 2.5)[0], atol=1e-5)
    assert (tempered.argmax(axis=0) == plain.argmax(axis=0)).all()


def test_voxels_are_sampled_where_the_target_is_known():
    probability = softmax(np.random.default_rng(4).normal(size=(1, 3, 30, 30)).astype(np.float32))[0]
    target = np.zeros((30, 30), dtype=np.uint8)
    target[:10], target[10:12] = 255, 2
    logits, labels = sample_voxels(probability, target, count=300)
    assert logits.shape == (300, 3) and labels.shape == (300,)
    assert set(labels.tolist()) == {0, 2}
    again, _ = sample_voxels(probability, target, count=300)
    assert (logits == again).all()


def test_probabilities_do_not_overflow():
    extreme = np.array([[1000.0, -1000.0]], dtype=np.float32)
    assert probabilities(extreme, "classification").tolist() == [[1.0, 0.0]]
    assert probabilities(extreme, "multilabel").tolist() == [[1.0, 0.0]]
