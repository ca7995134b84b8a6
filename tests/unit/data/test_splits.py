"""Splits: no patient on two sides, classes on every side, the given split wins."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medray.config.schema import SplitConfig
from medray.data.manifest import Case, Manifest
from medray.data.splits import Splits, make_splits
from medray.errors import DataError, LeakError


def manifest(cases: list[Case], classes: int = 2, task: str = "classification") -> Manifest:
    return Manifest.model_validate(
        {
            "source": "test",
            "root": ".",
            "task": task,
            "ndim": 2,
            "channels": 1,
            "classes": tuple(f"class{k}" for k in range(classes)),
            "cases": tuple(cases),
        }
    )


def case(i: int, **kwargs: object) -> Case:
    return Case.model_validate({"id": f"c{i:03d}", "images": (f"{i}.png",), **kwargs})


def sides(m: Manifest, splits: Splits) -> list[set[str]]:
    return [{m.cases[i].group for i in part} for part in (splits.train, splits.val, splits.test)]


def assert_sound(m: Manifest, splits: Splits) -> None:
    train, val, test = sides(m, splits)
    assert splits.train and splits.val
    assert not train & val and not train & test and not val & test
    assert sorted([*splits.train, *splits.val, *splits.test]) == list(range(len(m.cases)))


def labels(m: Manifest, part: tuple[int, ...]) -> Counter[object]:
    return Counter(m.cases[i].label for i in part)


def test_shares_and_strata() -> None:
    m = manifest([case(i, label=int(i % 10 == 0)) for i in range(200)])
    splits = make_splits(m, SplitConfig(test=0.15, folds=5), seed=0)
    assert_sound(m, splits)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (136, 34, 30)
    assert labels(m, splits.test)[1] == 3
    assert labels(m, splits.val)[1] in (3, 4)


def test_folds_cover_the_pool_once() -> None:
    m = manifest([case(i, label=i % 3, patient=f"p{i // 2}") for i in range(60)], classes=3)
    folds = [make_splits(m, SplitConfig(fold=k, folds=4), seed=3) for k in range(4)]
    assert len({f.test for f in folds}) == 1
    validated = sorted(i for f in folds for i in f.val)
    assert validated == sorted({*folds[0].train, *folds[0].val})
    for f in folds:
        assert_sound(m, f)
        assert set(labels(m, f.val)) == {0, 1, 2}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=50),
    test=st.sampled_from([0.0, 0.15, 0.5, 0.95]),
    folds=st.integers(2, 8),
    seed=st.integers(0, 5),
)
def test_always_sound_or_a_clear_error(rows: list[tuple[int, int]], test: float, folds: int, seed: int) -> None:
    m = manifest([case(i, patient=f"p{p}", label=k) for i, (p, k) in enumerate(rows)], classes=4)
    config = SplitConfig(test=test, folds=folds)
    if len({p for p, _ in rows}) < 2:
        with pytest.raises(DataError, match="two are needed"):
            make_splits(m, config, seed)
        return
    splits = make_splits(m, config, seed)
    assert_sound(m, splits)
    owners = {k: {p for p, label in rows if label == k} for _, k in rows}
    lone = {k: next(iter(who)) for k, who in owners.items() if len(who) == 1}
    if set(lone.values()) != {p for p, _ in rows}:  # what one patient alone shows can't be validated on: it is learnt
        assert set(lone) <= set(labels(m, splits.train))


def test_a_class_of_two_patients_is_trained_and_validated_on() -> None:
    m = manifest([case(i, label=int(i < 2)) for i in range(30)])
    splits = make_splits(m, SplitConfig(test=0.2), seed=1)
    assert labels(m, splits.train)[1] == 1
    in_some_fold = [labels(m, make_splits(m, SplitConfig(test=0.2, fold=k), seed=1).val)[1] for k in range(5)]
    assert sorted(in_some_fold) == [0, 0, 0, 1, 1]


def test_order_of_cases_does_not_matter_but_the_seed_does() -> None:
    cases = [case(i, label=i % 2, site="ab"[i % 2]) for i in range(50)]
    shuffled = random.Random(0).sample(cases, len(cases))
    a, b = manifest(cases), manifest(shuffled)
    one, other = make_splits(a, SplitConfig(), 7), make_splits(b, SplitConfig(), 7)
    assert sides(a, one) == sides(b, other)
    assert make_splits(a, SplitConfig(), 8) != one


def test_sites_are_spread() -> None:
    m = manifest([case(i, label=i % 2, site="big" if i % 5 else "small") for i in range(100)])
    splits = make_splits(m, SplitConfig(), 0)
    for part in (splits.val, splits.test):
        assert sum(m.cases[i].site == "small" for i in part) == pytest.approx(len(part) / 5, abs=1.5)


def test_multilabel_rare_labels_reach_every_side() -> None:
    rows = [(int(i % 9 == 0), int(i % 2), int(i % 11 == 0)) for i in range(99)]
    m = manifest([case(i, label=row) for i, row in enumerate(rows)], classes=3, task="multilabel")
    splits = make_splits(m, SplitConfig(), 0)
    for part in (splits.train, splits.val, splits.test):
        assert all(any(rows[i][k] for i in part) for k in range(3))


def test_a_given_split_wins() -> None:
    given_sides = ["train", "val", "test", None]
    m = manifest([case(i, label=0, split=given_sides[i % 4]) for i in range(40)])
    splits = make_splits(m, SplitConfig(test=0.5), 0)
    assert splits.test == tuple(range(2, 40, 4)) and splits.val == tuple(range(1, 40, 4))
    assert_sound(m, splits)


def test_given_train_and_test_leave_validation_to_a_fold_of_train() -> None:
    m = manifest([case(i, label=i % 2, split="test" if i < 10 else "train") for i in range(50)])
    splits = make_splits(m, SplitConfig(folds=4, fold=2), 0)
    assert splits.test == tuple(range(10))
    assert len(splits.val) == 10
    assert_sound(m, splits)


def test_given_train_alone_is_no_split() -> None:
    m = manifest([case(i, label=i % 2, split="train") for i in range(40)])
    assert make_splits(m, SplitConfig(), 0).test


def test_a_patient_on_two_given_sides_is_a_leak() -> None:
    m = manifest([case(i, label=0, patient=f"p{i // 2}", split="test" if i == 4 else "train") for i in range(8)])
    with pytest.raises(LeakError, match=r"1 patient.*p2 \(test and train\)"):
        make_splits(m, SplitConfig(), 0)


@pytest.mark.parametrize(
    ("cases", "config", "message"),
    [
        ([case(0, label=0)], SplitConfig(), "two are needed"),
        ([case(i, label=0, patient="same") for i in range(9)], SplitConfig(), "two are needed"),
        ([case(i, label=0, split="test") for i in range(9)], SplitConfig(), "may be trained on"),
        ([case(i, label=0) for i in range(9)], SplitConfig(test=1.0), "must be below 1"),
        ([case(i, label=0) for i in range(3)], SplitConfig(fold=4), "fold 4 of 5 would be empty"),
    ],
)
def test_impossible_splits_say_why(cases: list[Case], config: SplitConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_splits(manifest(cases), config, 0)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_tiny_data_sets_train_and_validate(n: int) -> None:
    m = manifest([case(i, label=i % 2) for i in range(n)])
    assert_sound(m, make_splits(m, SplitConfig(), 0))
