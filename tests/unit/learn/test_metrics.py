"""Metrics against scikit-learn, MONAI and values by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medray.learn import metrics as m


def cases(n: int = 200, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, np.clip(np.round(p, 2), 1e-9, 1)  # rounding makes ties


def test_dice_by_hand_and_nan_where_absent() -> None:
    target = np.array([[0, 1, 1], [2, 2, 255]])
    pred = np.array([[0, 1, 0], [2, 1, 3]])
    dice = m.dice_per_class(pred, target, 4)
    assert dice[:2] == pytest.approx([2 * 1 / (2 + 2), 2 * 1 / (1 + 2)])
    assert np.isnan(dice[2])


def test_hd95_matches_monai_on_the_whole_volume_and_scales_with_spacing() -> None:
    import torch
    from monai.metrics import compute_hausdorff_distance

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1)
    a = np.linalg.norm(grid - [10, 12, 11], axis=-1) < 5
    b = np.linalg.norm(grid - [13, 12, 10], axis=-1) < 4 + rng.random()
    spacing = (1.0, 2.0, 0.5)
    reference = compute_hausdorff_distance(
        torch.from_numpy(a)[None, None],
        torch.from_numpy(b)[None, None],
        include_background=True,
        percentile=95,
        spacing=spacing,
    )
    assert m.hd95(a, b, spacing) == pytest.approx(float(reference), rel=1e-5)
    assert m.hd95(a, b, (3.0, 3.0, 3.0)) == pytest.approx(3 * m.hd95(a, b), rel=1e-5)
    assert m.hd95(a, a, spacing) == 0


def test_hd95_at_the_border_and_where_masks_are_empty() -> None:
    a, b = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    assert np.isnan(m.hd95(a, b))
    a[0, 0] = True
    assert m.hd95(a, b, (3.0, 4.0)) == pytest.approx(50.0)
    b[0, 9] = True
    assert m.hd95(a, b, (1.0, 2.0)) == pytest.approx(18.0)
    assert np.isnan(m.hd95_per_class(a.astype(int), b.astype(int), 3)[1])


def test_mean_over_cases_weighs_classes_alike() -> None:
    assert m.mean_over_cases(np.array([[1.0, np.nan], [0.5, np.nan], [0.0, 0.2]])) == pytest.approx((0.5 + 0.2) / 2)
    assert np.isnan(m.mean_over_cases(np.full((2, 2), np.nan)))


def test_against_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.metrics")
    labels, p = cases()
    truth, predicted = np.eye(3)[labels], p.argmax(1)
    found = m.classification_metrics(labels, p)
    per_class = [sk.roc_auc_score(truth[:, k], p[:, k]) for k in range(3)]
    assert found["auc"] == pytest.approx(np.mean(per_class))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(truth, p, average="macro"))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(labels, predicted, average="macro"))
    assert found["f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    normal = p / p.sum(1, keepdims=True)
    assert m.log_loss(truth, normal) == pytest.approx(sk.log_loss(labels, np.clip(normal, 1e-7, 1)), rel=1e-4)
    labels, p = cases(classes=2)
    found = m.classification_metrics(labels, p)
    assert found["f1"] == pytest.approx(sk.f1_score(labels, p.argmax(1)))
    assert found["sensitivity"] == pytest.approx(sk.recall_score(labels, p.argmax(1)))
    assert found["specificity"] == pytest.approx(sk.recall_score(labels, p.argmax(1), pos_label=0))
    assert found["brier"] == pytest.approx(2 * sk.brier_score_loss(labels, p[:, 1]), rel=1e-3)
    fpr, tpr, _ = m.roc_curve(labels, p[:, 1])
    assert np.trapezoid(tpr, fpr) == pytest.approx(found["auc"])
    truth = np.eye(3)[cases()[0]]
    found = m.multilabel_metrics(truth, cases()[1])
    assert found["f1"] == pytest.approx(sk.f1_score(truth, cases()[1] >= 0.5, average="macro"))
    assert found["auc"] == pytest.approx(np.mean(per_class))


def test_auc_by_hand_and_without_a_class() -> None:
    assert m.binary_auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert m.binary_auc(np.array([0, 1]), np.array([0.5, 0.5])) == 0.5
    assert np.isnan(m.binary_auc(np.array([1, 1]), np.array([0.1, 0.2])))
    labels, p = cases(classes=3)
    two = labels != 2
    assert not np.isnan(m.classification_metrics(labels[two], p[two])["auc"])


def test_ece_of_the_calibrated_is_small_and_of_the_overconfident_is_the_gap() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(50_000)
    assert m.ece(confidence, rng.random(50_000) < confidence) < 0.01
    assert m.ece(np.full(1000, 0.95), rng.random(1000) < 0.5) == pytest.approx(0.45, abs=0.05)
