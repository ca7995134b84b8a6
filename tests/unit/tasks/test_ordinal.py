"""Ordinal grading: CORN's definition, its promise of consistent ranks, the metrics by hand, the order of grades."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medray.errors import DataError
from medray.predict.calibration import fit_temperature
from medray.tasks.ordinal import MOST, TASK, Corn, quadratic_kappa, ranked_probability_score


def test_corn_is_the_papers_sum_over_conditional_subsets() -> None:
    """Shi et al. 2023, equation 7: for each step the cases that reach it, and among them who passes."""
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    grades = torch.arange(50) % 5
    total = torch.zeros(())
    for step in range(4):
        reached = grades >= step
        passed = (grades[reached] > step).float()
        total = total + F.binary_cross_entropy_with_logits(logits[reached, step], passed, reduction="sum")
    assert torch.isclose(Corn(255, None)(logits, grades), total / 50)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_case_alone_pulls_as_it_does_in_its_batch(smoothing: float) -> None:
    """Private training takes each case's gradient alone: a high grade, which reaches more steps, weighs no less."""
    loss = Corn(255, None, smoothing=smoothing)
    grades = torch.tensor([0, 1, 2, 4, 255])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (batch,) = torch.autograd.grad(loss(logits, grades), logits)
    alone = [torch.autograd.grad(loss(logits[i : i + 1], grades[i : i + 1]), logits)[0] for i in range(5)]
    torch.testing.assert_close(torch.stack(alone).sum(0) / 4, batch)
    parts = [torch.autograd.grad(loss(logits[i], grades[i], whole=grades), logits)[0] for i in (slice(3), slice(3, 5))]
    torch.testing.assert_close(parts[0] + parts[1], batch)


def test_grades_that_are_shared_weigh_by_their_shares() -> None:
    """Mixup: two halves of one case cost what the two cases do."""
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    for loss in (Corn(255, None), Corn(255, weights), Corn(255, None, smoothing=0.2)):
        both = loss(logits.expand(2, -1), torch.tensor([1, 3]))
        assert torch.isclose(loss(logits, torch.tensor([[0.0, 0.5, 0.0, 0.5]])), both)


def test_a_weight_counts_as_so_many_cases() -> None:
    logits = torch.randn(2, 2, generator=torch.Generator().manual_seed(2))
    double = Corn(255, torch.tensor([1.0, 2.0, 1.0]))(logits, torch.tensor([0, 1]))
    assert torch.isclose(double, Corn(255, None)(logits[[0, 1, 1]], torch.tensor([0, 1, 1])))


def test_a_higher_grade_is_never_more_probable_than_a_lower_one_to_be_exceeded() -> None:
    """Whatever the network says, also where its single outputs contradict each other."""
    logits = 20 * np.random.default_rng(0).standard_normal((500, 5))
    p = TASK.probabilities(logits)
    above = p[:, ::-1].cumsum(1)[:, ::-1][:, 1:]
    assert p.min() >= 0 and np.allclose(p.sum(1), 1, atol=1e-5)
    assert (np.diff(above, axis=1) <= 1e-6).all()
    assert np.array_equal(TASK.decide(p), (above > 0.5).sum(1))


def test_the_decision_is_the_median_and_not_the_likeliest() -> None:
    p = np.array([[0.4, 0.05, 0.3, 0.25]])
    assert p.argmax() == 0 and TASK.decide(p).tolist() == [2]


def test_kappa_and_the_ranked_probability_score_by_hand() -> None:
    grades, decided = np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0])
    # seen: one error of distance 2, so 4; chance: sum of (i - j)^2 * (1, 1, 2)_i * (2, 1, 1)_j / 4
    chance = (1 * (0 * 2 + 1 * 1 + 4 * 1) + 1 * (1 * 2 + 0 * 1 + 1 * 1) + 2 * (4 * 2 + 1 * 1 + 0 * 1)) / 4
    assert quadratic_kappa(grades, decided, 3) == pytest.approx(1 - 4 / chance)
    assert quadratic_kappa(grades, grades, 3) == 1
    assert np.isnan(quadratic_kappa(np.zeros(4, int), np.zeros(4, int), 3))
    assert ranked_probability_score(np.array([2]), np.array([[0.5, 0.25, 0.25]])) == pytest.approx(0.5**2 + 0.75**2)


def test_a_far_miss_costs_more_than_a_near_one() -> None:
    grades = np.array([0, 1, 2, 3] * 5)
    near, far = grades.copy(), grades.copy()
    near[0], far[0] = 1, 3
    scores = [TASK.measures(grades, np.eye(4)[decided]) for decided in (near, far)]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["kappa"] > scores[1]["kappa"] and scores[0]["mae"] < scores[1]["mae"]


def test_the_temperature_of_steps_is_found_again() -> None:
    """Grades drawn from the probabilities of logits z; the model that says 3 z is three times too sure."""
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.standard_normal((4000, 3))
    p = TASK.probabilities(logits).astype(np.float64)
    grades = (rng.random((4000, 1)) > p.cumsum(1)).sum(1).clip(max=3)
    assert fit_temperature(3 * logits, grades, "ordinal") == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        (("0", "1", "2"), ("0", "1", "2")),
        (("1", "2", "4"), ("1", "2", "3", "4")),
        (("grade0", "grade2"), ("grade0", "grade1", "grade2")),
        (("08", "09", "10"), ("08", "09", "10")),
    ],
)
def test_numbers_are_grades_also_where_one_is_missing(found: tuple[str, ...], classes: tuple[str, ...]) -> None:
    assert TASK.arrange(found, None, "x") == classes


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (("mild", "none", "severe"), "have no order"),
        (("1", "2", "severe"), "have no order"),
        (("grade1", "stage2"), "have no order"),
        (("1", "01"), "have no order"),
        (("0", str(MOST)), f"at most {MOST}"),
        ((), "have no order"),
    ],
)
def test_names_without_an_order_need_one(found: tuple[str, ...], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        TASK.arrange(found, None, "cases.csv")
    assert TASK.arrange(found, ("none", "mild", "severe"), "cases.csv") == ("none", "mild", "severe")
