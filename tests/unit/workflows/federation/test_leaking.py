"""Losses by case for the attack, of each kind of task; and what overfitting gives away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medray.config.privacy import PrivacyConfig
from medray.errors import PrivacyError
from medray.privacy.attack import most_true_positives
from medray.workflows.champion import Scores
from medray.workflows.federation import leaking
from medray.workflows.federation.conclude import _attacked
from medray.workflows.federation.leaking import attacks, case_losses


def scores(kind: Any, **fields: Any) -> Scores:
    return Scores(kind=kind, indices=(), groups=np.zeros(0, np.str_), **fields)


def test_losses_are_the_tasks_own() -> None:
    logits = np.array([[0.0, math.log(3)], [2.0, 2.0]], np.float32)
    found = case_losses(scores("classification", logits=logits, targets=np.array([1, 0])))
    assert found == pytest.approx([-math.log(0.75), math.log(2)], rel=1e-6)
    found = case_losses(scores("multilabel", logits=np.zeros((1, 3), np.float32), targets=np.array([[1, 0, 1]])))
    assert found == pytest.approx([3 * math.log(2)])
    dice = np.array([[0.5, np.nan], [np.nan, np.nan], [1.0, 0.6]])
    assert case_losses(scores("segmentation", dice=dice)) == pytest.approx([0.5, 0.0, 0.2])
    sure = np.array([[1000.0, -1000.0]], np.float32)
    assert np.isfinite(case_losses(scores("classification", logits=sure, targets=np.array([1]))))[0]


def test_each_case_is_judged_by_its_own_sites_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows its own site's training cases by heart, and those of no other."""
    cases = [SimpleNamespace(site="ab"[n % 2], group=f"p{n}") for n in range(80)]
    recipe = SimpleNamespace(manifest=SimpleNamespace(cases=cases))
    train, unseen = list(range(0, 40)), list(range(40, 80))

    def score(recipe: Any, candidates: Any, indices: list[int], *, metric: str) -> dict[str, Scores]:
        [candidate] = candidates
        knows = [i in train and cases[i].site == candidate.members[0] for i in indices]
        logits = np.array([[0.0, 9.0 if known else 0.01 * i] for known, i in zip(knows, indices, strict=True)])
        targets = np.ones(len(indices), np.int64)
        return {candidate.name: scores("classification", logits=logits.astype(np.float32), targets=targets)}

    monkeypatch.setattr(leaking.choosing, "score", score)
    models: Any = {"federated": {"a": "a", "b": "b"}, "pooled": {"a": "none", "b": "none"}}
    private = PrivacyConfig.model_validate({"epsilon": 1.0, "delta": 1e-3})
    privacy = {"federated": private, "pooled": PrivacyConfig()}
    rows = attacks(recipe, models, train, unseen, metric="auc", privacy=privacy, seed=0)  # type: ignore[arg-type]
    assert [row.model for row in rows] == ["federated", "pooled"]
    assert rows[0].auc.value == rows[0].found.value == 1.0 and (rows[0].members, rows[0].others) == (40, 40)
    assert rows[0].most == pytest.approx(most_true_positives(1.0, 1e-3, 0.1)) and rows[1].most is None
    assert rows[1].auc.value < 0.1, "what it was trained on looks no better to it"
    with pytest.raises(PrivacyError, match="9 cases that were trained on"):
        attacks(recipe, models, train[:9], unseen, metric="auc", privacy=privacy, seed=0)  # type: ignore[arg-type]


def test_an_attack_that_fails_costs_no_report() -> None:
    @dataclass(frozen=True)
    class Page:
        protection: str = "None."
        attacks: tuple[Any, ...] = ()

    def fails() -> tuple[Any, ...]:
        raise PrivacyError("losses that are NaN.")

    page: Any = Page()
    assert _attacked(page, lambda: ("row",)).attacks == ("row",)  # type: ignore[arg-type,return-value,comparison-overlap]
    found = _attacked(page, fails)
    assert found.attacks == () and found.protection == (
        "None. What the model gives away was not tried: PrivacyError: losses that are NaN."
    )
