"""What is refused under privacy, what gives way, figures that leave, and the attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medray.config.compose import build_experiment
from medray.config.schema import Experiment
from medray.errors import ConfigError, PrivacyError
from medray.privacy.attack import membership_attack, most_true_positives
from medray.privacy.figures import private_mean
from medray.privacy.noise import SecureRandom
from medray.privacy.rules import adapted, check_private

PLAN: dict[str, Any] = {
    "preprocess": {"normalize": "ct", "clip": [[-100.0, 200.0]], "mean": [10.0], "std": [30.0]},
    "loss": {"name": "dice_ce", "batch_dice": True},
    "train": {"budget": 60.0, "checkpointing": "auto", "epochs": 1000, "ema": 0.99},
}


def private(explicit: dict[str, Any], kind: str = "segmentation") -> Experiment:
    explicit = {"privacy": {"epsilon": 3.0}, **explicit}
    experiment = build_experiment(*adapted(PLAN, explicit))
    check_private(experiment, kind=kind)
    return experiment


def test_the_plan_gives_way_and_so_does_a_plan_that_was_written_out() -> None:
    for explicit in ({}, PLAN, build_experiment(PLAN).model_dump(mode="json", exclude={"privacy"})):
        found = private(explicit)
        assert (found.preprocess.normalize, found.preprocess.clip, found.model.norm) == ("zscore", None, "group")
        assert not found.loss.batch_dice and found.train.budget is None and found.train.checkpointing == "off"
        assert found.train.epochs == 30 and found.train.ema == 0.99


def test_without_privacy_nothing_changes() -> None:
    assert build_experiment(*adapted(PLAN, {})) == build_experiment(PLAN)
    check_private(Experiment(), kind="segmentation")


@pytest.mark.parametrize(
    ("section", "name", "value", "kind"),
    [
        ("train", "mixup", 0.2, "classification"),
        ("train", "cutmix", 0.2, "classification"),
        ("train", "balanced", True, "classification"),
        ("train", "checkpointing", 3, "segmentation"),
        ("train", "patience", 3, "segmentation"),
        ("train", "budget", 90.0, "segmentation"),
        ("train", "workers", 2, "segmentation"),
        ("train", "precision", "bf16", "segmentation"),
        ("augment", "adaptive", True, "segmentation"),
        ("schedule", "name", "plateau", "segmentation"),
    ],
)
def test_what_is_unsound_is_refused_by_name(section: str, name: str, value: Any, kind: str) -> None:
    with pytest.raises(PrivacyError, match=rf"not sound under privacy.epsilon: .*{section}.{name}"):
        private({section: {name: value}}, kind)


def test_class_weights_that_would_cancel_are_refused() -> None:
    with pytest.raises(PrivacyError, match="class_weights cancel"):
        private({"loss": {"name": "cross_entropy", "class_weights": [1.0, 2.0]}}, "classification")
    assert private({"loss": {"class_weights": [1.0, 2.0]}}).loss.class_weights == (1.0, 2.0)


def test_constants_of_the_user_are_public_and_the_data_s_are_not() -> None:
    own = {"normalize": "ct", "clip": [[-1000.0, 1000.0]], "mean": [0.0], "std": [500.0]}
    assert private({"preprocess": own}).preprocess.clip == ((-1000.0, 1000.0),)
    other = {**PLAN, "preprocess": {"normalize": "zscore"}}
    with pytest.raises(PrivacyError, match=r"would take preprocess.clip, .* from private images"):
        build_experiment(*adapted(other, {"privacy": {"epsilon": 1.0}, "preprocess": {"normalize": "ct"}}))


def test_a_study_is_refused(tmp_path: Any) -> None:
    from medray.workflows.study import tune

    for overrides in (["privacy.epsilon=3"], ["space.privacy.epsilon.choice=[1, 2]"]):
        with pytest.raises(ConfigError, match="in every trial"):
            tune(None, overrides, runs=tmp_path)


def test_a_private_mean_has_the_noise_that_it_says() -> None:
    source = SecureRandom(bytes(32))
    scores = np.tile([1.0, 1.0, 0.0, float("nan")], 500)
    found = np.array([private_mean(scores, None, 5.0, source) for _ in range(400)])
    expected = 5.0 * np.sqrt(2) * np.sqrt(1 + 0.5**2) / 2000  # of a ratio, to first order
    assert abs(found.mean() - 0.5) < 4 * expected / 20 and found.std() == pytest.approx(expected, rel=0.15)


def test_a_patient_counts_once_and_few_patients_not_at_all() -> None:
    source = SecureRandom(bytes(32))
    scores, groups = [1.0] * 900 + [0.0] * 100, [0] * 900 + list(range(1, 101))
    assert private_mean(scores, groups, 1e-6, source) == pytest.approx(1 / 101, abs=1e-6)
    assert np.isnan([private_mean([1.0] * 5, None, 5.0, source) for _ in range(20)]).all()


def test_the_attack_finds_a_network_that_has_learnt_by_heart() -> None:
    rng = np.random.default_rng(0)
    others = rng.exponential(1.0, 500)
    leaking = membership_attack(0.02 * rng.exponential(1.0, 500), others, resamples=200)
    assert leaking.auc > 0.95 and leaking.true_positives > 0.2 and leaking.true_positives_low > 0.05
    grid = -np.log(1 - (np.arange(1000) + 0.5) / 1000)
    fair = membership_attack(grid[::2], grid[1::2], resamples=200)
    assert fair.auc_low < 0.5 < fair.auc_high and fair.true_positives < 0.05
    same = membership_attack([1.0, 1.0], [1.0, 1.0], resamples=10)
    assert (same.auc, same.true_positives) == (0.5, 0.0)
    # Ten patients of fifty images each are ten draws, not five hundred.
    losses = np.repeat(rng.exponential(1.0, 10), 50)
    patients = [f"p{n // 50}" for n in range(500)]
    one = membership_attack(losses, losses, resamples=100)
    ten = membership_attack(losses, losses, groups=(patients, patients), resamples=100)
    assert ten.auc == one.auc == 0.5 and ten.auc_high - ten.auc_low > 3 * (one.auc_high - one.auc_low)
    with pytest.raises(PrivacyError, match="none NaN"):
        membership_attack([float("nan"), 1.0], [1.0, 2.0])


def test_what_epsilon_promises_against_any_attack() -> None:
    assert most_true_positives(0.0, 0.0, 0.01) == pytest.approx(0.01)
    assert most_true_positives(1.0, 1e-5, 0.01) == pytest.approx(np.e * 0.01 + 1e-5)
    assert most_true_positives(800.0, 1e-5, 0.01) == pytest.approx(1.0)
