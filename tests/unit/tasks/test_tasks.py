"""What every task keeps to, whatever it is: these are the rules that the rest of the house relies on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medray.errors import ConfigError, ModelError
from medray.tasks.catalogue import TASKS, direction_of, find_task, named_for
from medray.tasks.task import Task

K, N = 4, 60
EVERY = [pytest.param(task, id=name) for name, task in TASKS.items()]
WHOLE = [pytest.param(task, id=name) for name, task in TASKS.items() if not task.dense]


def logits_of(task: Task, seed: int = 0, n: int = N) -> Any:
    space = (3, 2) if task.dense else ()
    shape = (n, task.outputs(K), *space)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(task: Task, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, (N, K)) if task.target == "labels" else rng.integers(0, K, N)


@pytest.mark.parametrize("task", EVERY)
def test_a_task_says_all_that_the_house_asks(task: Task) -> None:
    assert task.name in TASKS and task.description and task.losses and task.metrics and task.guarded
    name, direction = task.objective
    assert name.removeprefix("val/") in task.metrics and direction in ("max", "min")
    assert all(task.metrics.get(guarded, "max") == "max" for guarded in task.guarded), "a drop is what is measured"
    assert named_for(task.target)


@pytest.mark.parametrize("task", EVERY)
def test_logits_and_answers_are_each_others_inverse(task: Task) -> None:
    logits = logits_of(task)
    answers = task.log_probabilities(logits)
    assert torch.allclose(answers.exp().sum(1), torch.ones(()).double()), "they exclude each other, and one is true"
    back = task.logits(answers)
    assert back.shape == logits.shape and torch.allclose(task.log_probabilities(back), answers)


@pytest.mark.parametrize("task", EVERY)
def test_what_a_user_sees_is_what_networks_are_averaged_by(task: Task) -> None:
    logits = logits_of(task)
    shown, answers = task.probabilities(logits.numpy()), task.log_probabilities(logits).exp().numpy()
    assert shown.dtype == np.float32 and shown.shape[1] == K
    same = answers[:, 1] if task.target == "labels" else answers
    assert np.allclose(shown, same, atol=1e-6)
    decided, likeliest = task.decide(shown), task.likeliest(task.log_probabilities(logits)).numpy()
    assert np.array_equal(decided, likeliest[:, 1] if task.target == "labels" else likeliest.argmax(1))
    assert np.array_equal(likeliest.sum(1), np.ones_like(likeliest[:, 0]))


@pytest.mark.parametrize("task", EVERY)
def test_networks_are_averaged_by_their_probabilities(task: Task) -> None:
    one, other = logits_of(task, 1), logits_of(task, 2)
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    mixed = task.probabilities(task.mix([one, other], shares.log()).numpy())
    expected = 0.25 * task.probabilities(one.numpy()) + 0.75 * task.probabilities(other.numpy())
    assert np.allclose(mixed, expected, atol=1e-5)
    alone = task.mix([one, other], torch.tensor([1.0, 0.0], dtype=torch.float64).log())
    assert np.allclose(task.probabilities(alone.numpy()), task.probabilities(one.numpy()), atol=1e-5)
    sure = task.mix([1e4 * one.float(), 1e4 * one.float()], torch.tensor([0.5, 0.5]).log())
    assert torch.isfinite(task.log_probabilities(sure).exp()).all()


@pytest.mark.parametrize("task", WHOLE)
def test_most_votes_win_and_none_is_impossible(task: Task) -> None:
    one, other = logits_of(task, 1), logits_of(task, 2)
    voted = task.probabilities(task.vote([one, one, other]).numpy())
    assert np.array_equal(task.decide(voted), task.decide(task.probabilities(one.numpy())))
    assert voted.min() > 0 and voted.max() < 1


@pytest.mark.parametrize("task", WHOLE)
def test_metrics_curves_and_reliability_agree_about_perfection(task: Task) -> None:
    targets = targets_of(task)
    perfect = targets.astype(float) if task.target == "labels" else np.eye(K)[targets]
    found = task.measures(targets, perfect)
    assert {*task.metrics, *task.evaluated, *task.guarded, task.private_metric} <= set(found)
    best = {name: value for name, value in found.items() if name in task.metrics}
    assert all(abs(value - (task.metrics[name] == "max")) < 1e-6 for name, value in best.items()), best
    assert all(task.measure(name, targets, perfect) == pytest.approx(value) for name, value in best.items())
    assert np.array_equal(task.correct(targets, perfect), np.ones(N))
    confidence, correct = task.confident(targets, perfect)
    assert confidence.shape == correct.shape and np.abs(confidence - correct).max() < 1e-6
    questions = task.questions(targets, perfect, tuple("abcd"))
    assert questions and len({question.name for question in questions}) == len(questions)
    assert all(np.array_equal(question.truth, question.score > 0.5) for question in questions)


@pytest.mark.parametrize("task", WHOLE)
def test_the_measured_is_worse_where_the_answers_are(task: Task) -> None:
    targets, wrong = targets_of(task), targets_of(task, seed=1)
    answers = wrong.astype(float) if task.target == "labels" else np.eye(K)[wrong]
    found = task.measures(targets, 0.98 * answers + 0.01)
    for name, direction in task.metrics.items():
        assert (found[name] < 0.8) if direction == "max" else (found[name] > 0.1), name


@pytest.mark.parametrize("task", WHOLE)
def test_evidence_of_a_class_rises_with_its_probability(task: Task) -> None:
    logits = logits_of(task, n=1)
    for target in range(K):
        asked = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(task.evidence(asked, target).sum(), asked)
        more, less = (task.probabilities((logits + step * gradient).numpy()) for step in (1e-2, -1e-2))
        assert more[0, target] > less[0, target]


@pytest.mark.parametrize("task", WHOLE)
def test_uncertainty_is_between_certain_and_no_idea(task: Task) -> None:
    certain = np.eye(K, dtype=np.float32)[0]
    even = np.full(K, 0.5 if task.target == "labels" else 1 / K, np.float32)
    assert task.uncertainty(certain) == pytest.approx(0, abs=1e-5)
    assert task.uncertainty(even) == pytest.approx(1, abs=1e-5)


def test_labels_are_told_where_they_reach_their_threshold() -> None:
    task = find_task("multilabel")
    assert task.decide(np.array([[0.5, 0.4]])).tolist() == [[1, 0]]
    assert task.decide(np.array([[0.5, 0.4]]), (0.6, 0.4)).tolist() == [[0, 1]]
    with pytest.raises(ModelError, match="one a label"):
        task.decide(np.array([[0.5, 0.4]]), (0.5,))


def test_an_unknown_task_or_loss_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'segmentation'\? There are: classification"):
        find_task("segmentaton")
    with pytest.raises(ConfigError, match="use one of corn"):
        find_task("ordinal").check_loss("dice")


def test_a_metrics_direction_is_known_without_its_task() -> None:
    assert [direction_of(name) for name in ("dice", "auc", "log_loss", "mae", "kappa")] == [
        "max", "max", "min", "min", "max"
    ]  # fmt: skip
