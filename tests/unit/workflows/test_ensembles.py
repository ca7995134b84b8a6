"""Ensembles of what is there already: how they are fitted, judged, exported; what a trial keeps for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medray.bundle.ensemble import EnsembleModel
from medray.tasks.catalogue import find_task
from medray.train.progress import Progress
from medray.workflows import champion as choosing
from medray.workflows import ensembles
from medray.workflows.champion import Answers, Candidate, score
from medray.workflows.ensembles import _Said, cross_fitted, further, greedy, greedy_soup, stack
from medray.workflows.packing import write_champion
from medray.workflows.planning import prepare_directory
from medray.workflows.predictions import NAME, Predictions, load_predictions
from medray.workflows.recipe import Recipe
from tests.unit.workflows.test_champion import Answering, classified, untrained


def said(shares, targets, groups=None, *, kind="classification", metric="accuracy", case=None):
    shares, targets = np.asarray(shares, float), np.asarray(targets)
    case = np.arange(len(targets)) if case is None else np.asarray(case)
    groups = np.asarray([str(g) for g in (groups if groups is not None else range(int(case.max()) + 1))])
    return _Said(kind=kind, metric=metric, shares=shares, targets=targets, case=case, groups=groups)


def complementary(count=60):
    """Two networks that are each sure and right on their own half, unsure on the other; a third that only errs."""
    targets = np.arange(count) % 2
    right, unsure = np.eye(2)[targets] * 0.8 + 0.1, np.full((count, 2), 0.5) + (0.5 - np.eye(2)[targets]) * 0.1
    half = (np.arange(count) < count // 2)[:, None]
    return said([np.where(half, right, unsure), np.where(half, unsure, right), 1 - right], targets)


# Fitting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [greedy("max"), stack], ids=["greedy", "stack"])
def test_networks_that_complement_each_other_share_the_weight(fit):
    weights = fit(complementary())
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    assert weights[0] == pytest.approx(weights[1], abs=0.2) and weights[:2].min() > 0.3 and weights[2] < 0.15


def test_a_metric_to_be_minimised_is_followed_down():
    weights = greedy("min")(replace(complementary(), metric="log_loss"))
    assert weights[:2].min() > 0.3 and weights[2] == 0


def test_greedy_selection_never_falls_below_the_best_network():
    rng = np.random.default_rng(0)
    for seed in range(20):
        shares = rng.dirichlet(np.ones(3), (5, 40))
        found = said(shares, rng.integers(0, 3, 40), metric="auc")
        weights = greedy("max")(found)
        mixed = found.value(np.tensordot(weights, found.shares, 1))
        assert mixed >= max(found.value(one) for one in found.shares) - 1e-12, seed


def test_an_ensemble_has_at_most_so_many_members():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, 400)
    noisy = np.clip(0.5 + (np.eye(2)[targets] - 0.5) * 0.2 + rng.normal(0, 0.3, (15, 400, 2)), 0.01, 0.99)
    for fit in (greedy("max"), stack):
        assert 2 <= np.count_nonzero(fit(said(noisy, targets, metric="log_loss" if fit is stack else "auc"))) <= 6


def test_a_stack_of_few_cases_stays_near_equal_weights():
    """One case for a network is chance; three hundred are not."""
    one = said([[[0.9, 0.1]], [[0.4, 0.6]]], [0])
    many = said(np.repeat(one.shares, 300, axis=1), np.zeros(300, int))
    assert stack(one)[0] == pytest.approx(0.5, abs=0.05) and stack(many)[0] > 0.9


def test_a_case_counts_once_however_many_voxels_it_has():
    """Network 0 is right in one case of a thousand voxels, network 1 in nine of one voxel each."""
    shares = np.zeros((2, 1009, 2))
    shares[0, :1000], shares[0, 1000:] = [0.9, 0.1], [0.1, 0.9]
    shares[1] = 1 - shares[0]
    case = np.r_[np.zeros(1000, int), np.arange(1, 10)]
    weights = stack(said(shares, np.zeros(1009, int), kind="segmentation", metric="dice", case=case))
    assert weights[1] > 0.6


def test_voxels_are_judged_by_dice():
    shares = np.asarray([[[0.2, 0.8], [0.2, 0.8], [0.8, 0.2], [0.8, 0.2]]])
    found = said(shares, [1, 0, 1, 0], kind="segmentation", metric="dice", case=[0, 0, 1, 1])
    assert found.value(shares[0]) == pytest.approx(0.5)


def test_a_case_is_judged_without_its_patient():
    """A network that knows one patient alone gets no weight on that patient's cases from them."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(10), 3)
    seen: list[set[str]] = []

    def fit(part):
        seen.append(set(part.groups[np.unique(part.case)].tolist()))
        return np.asarray([1.0, 0.0])

    found = said(rng.dirichlet(np.ones(2), (2, 30)), rng.integers(0, 2, 30), groups)
    weights, by_case = cross_fitted(fit, found)
    assert weights.tolist() == [1, 0] and sorted(by_case) == list(range(30))
    folds, whole = seen[:-1], seen[-1]
    assert len(folds) == 5 and len(whole) == 10
    left_out = [whole - fold for fold in folds]
    assert sorted(name for names in left_out for name in names) == sorted(whole)  # each patient in one fold


# The networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    made = {}
    for name, source, explicit in (
        ("cls", "phantom://xray-nodules?cases=16&size=32", {"model": {"name": "small_cnn", "feature_size": 4}}),
        (
            "seg",
            "phantom://ct-lesions?cases=9&size=16",
            {
                "model": {"name": "unet", "feature_size": 4, "depth": 2, "deep_supervision": False},
                "train": {"patch_size": [16, 16, 16]},
                "preprocess": {"spacing": None},
            },
        ),
    ):
        folder = tmp_path_factory.mktemp(name)
        prepare_directory(source, folder)
        explicit["train"] = {"precision": "fp32"} | explicit.get("train", {})
        made[name] = Recipe(directory=str(folder), explicit=explicit | {"device": "cpu"}, cache=str(folder / "cache"))
    return made


def judged(recipe, singles, *, metric, indices):
    known = Answers()
    alone = [Candidate(name=name, members=(trained,)) for name, trained in singles]
    return known, score(recipe, alone, indices, metric=metric, known=known)


def test_no_network_runs_twice(recipes, monkeypatch):
    recipe = recipes["cls"]
    singles = [(str(seed), untrained(recipe, seed)) for seed in range(3)]
    known, scores = judged(recipe, singles, metric="auc", indices=range(16))
    assert all(known.seconds(trained) > 0 for _, trained in singles)
    monkeypatch.setattr(choosing, "classify", lambda *_a, **_k: pytest.fail("a network ran again"))
    found, more = further(recipe, singles, scores, known, direction="max")
    assert {candidate.name.split()[0] for candidate in found} >= {"vote", "stack"}
    assert more.keys() == {candidate.name for candidate in found}
    assert all(scores.indices == tuple(range(16)) for scores in more.values())


def test_what_was_forgotten_for_want_of_room_is_not_fitted_to(recipes):
    recipe = recipes["cls"]
    singles = [(str(seed), untrained(recipe, seed)) for seed in range(2)]
    _, scores = judged(recipe, singles, metric="auc", indices=range(16))
    assert further(recipe, singles, scores, Answers(limit=0), direction="max") == ([], {})


@pytest.mark.parametrize("name", ["cls", "seg"])
def test_a_weighted_ensemble_is_exported_as_it_was_judged(recipes, name, tmp_path):
    """The bundle's one graph, by torch and by ONNX Runtime, says what the candidate said."""
    from medray.bundle.read import Bundle

    recipe = recipes[name]
    metric = "auc" if name == "cls" else "dice"
    singles = [(str(seed), untrained(recipe, seed)) for seed in range(3)]
    members = tuple(trained for _, trained in singles)
    candidates = [Candidate(name="stack", members=members, weights=(0.5, 0.3, 0.2))]
    if name == "cls":
        candidates.append(Candidate(name="vote", members=members, rule="vote"))
    for candidate in candidates:
        scores = score(recipe, [candidate], range(3), metric=metric)[candidate.name]
        write_champion(
            tmp_path / candidate.name, recipe, candidate, scores, name="x", temperature=1.0, metrics={}, notes=()
        )
        bundle = Bundle.open(tmp_path / candidate.name)
        assert (bundle.spec.weights, bundle.spec.vote) == (candidate.weights, candidate.rule == "vote")
        assert "onnx" in bundle.runtimes
        from medray.data.readers import read_case

        image, _, _ = read_case(recipe.manifest.cases[1], Path(recipe.manifest.root))
        for runtime in ("torch", "onnx"):
            answer = bundle.predict(image, bundle.predictor(runtime))
            if name == "cls":
                expected = np.exp(scores.logits[1]) / np.exp(scores.logits[1]).sum()
                np.testing.assert_allclose(answer.probabilities, expected, atol=1e-3)
            else:
                assert (answer.labels == choosing.labels_of(recipe, candidate, image)).mean() > 0.999


@pytest.mark.parametrize("kind", ["classification", "multilabel", "ordinal"])
@pytest.mark.parametrize("rule", ["mean", "vote"])
def test_weighted_logits_are_the_bundles(kind, rule):
    torch.manual_seed(0)
    parts = [torch.randn(6, 3) * 20 for _ in range(3)]
    weights = None if rule == "vote" else (0.6, 0.3, 0.1)
    expected = EnsembleModel([Answering(part) for part in parts], kind, weights, rule)(torch.zeros(6, 1)).numpy()
    found = np.stack(
        [
            choosing._mean_logits([part[row].numpy() for part in parts], find_task(kind), weights, rule)
            for row in range(6)
        ]
    )
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_member_of_no_weight_counts_for_nothing():
    parts = [np.asarray([3.0, 0.0]), np.asarray([-50.0, 0.0])]
    np.testing.assert_allclose(
        choosing._mean_logits(parts, find_task("classification"), (1.0, 0.0)), [-0.0486, -3.0486], atol=1e-3
    )
    assert choosing._mean([np.ones(2, np.float32), np.zeros(2, np.float32)], (1.0, 0.0)).tolist() == [1, 1]


# Soups ---------------------------------------------------------------------------------------------------------------


def test_a_soup_grows_only_while_validation_gains(recipes, monkeypatch):
    """Scores are given: the pair of 0 and 2 is better, with 1 it is not."""
    recipe = recipes["seg"]
    singles = [(str(seed), untrained(recipe, seed)) for seed in range(3)]
    known, scores = judged(recipe, singles, metric="dice", indices=(0, 1))
    scores = {
        name: replace(found, dice=np.full_like(found.dice, value))
        for (name, found), value in zip(scores.items(), (0.6, 0.5, 0.4), strict=True)
    }
    values, tried = iter((0.55, 0.7)), []

    def fake(_recipe, candidates, _indices, **_more):
        tried.append(candidates[0].lead.model.state_dict())
        return {"soup": replace(scores["0"], dice=np.full_like(scores["0"].dice, next(values)))}

    monkeypatch.setattr(ensembles, "score", fake)
    found = greedy_soup(recipe, singles, scores, direction="max", spare=lambda: True, known=known)
    assert found is not None and found[0].name == "greedy soup of 2" and found[1].value == pytest.approx(0.7)
    states = [trained.model.state_dict() for _, trained in singles]
    for name, tensor in found[0].lead.model.state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[2][name]) / 2)
    assert greedy_soup(recipe, singles, scores, direction="max", spare=lambda: False, known=known) is None


# What trials keep ----------------------------------------------------------------------------------------------------


def progress(value):
    return Progress(epoch=1, step=1, fraction=0.5, seconds=1.0, metrics={"val/auc": value})


def test_a_trial_keeps_what_it_said_at_its_best(tmp_path):
    kept = Predictions(tmp_path, ("val/auc", "max"))
    for value in (0.6, 0.8, 0.7, float("nan")):
        kept.take([5, 3], np.full((2, 2), value))
        kept.keep(progress(value))
    np.testing.assert_allclose(load_predictions(tmp_path, (3, 5), outputs=2), np.full((2, 2), 0.8))
    again = Predictions(tmp_path, ("val/auc", "max"))  # the run was killed, and goes on
    again.take([5, 3], np.full((2, 2), 0.75))
    again.keep(progress(0.75))
    np.testing.assert_allclose(load_predictions(tmp_path, (3, 5), outputs=2), np.full((2, 2), 0.8))


def test_predictions_of_other_cases_or_classes_are_none(tmp_path):
    kept = Predictions(tmp_path, ("val/log_loss", "min"))
    kept.take([1, 2], np.asarray([[0.1, 0.2], [0.3, 0.4]]))
    kept.keep(Progress(epoch=1, step=1, fraction=1.0, seconds=1.0, metrics={"val/log_loss": 0.3}))
    np.testing.assert_allclose(load_predictions(tmp_path, (2, 1), outputs=2), [[0.3, 0.4], [0.1, 0.2]], rtol=1e-6)
    assert load_predictions(tmp_path, (1, 9), outputs=2) is None
    assert load_predictions(tmp_path, (1, 2), outputs=3) is None
    (tmp_path / NAME).write_bytes(b"PK\x03\x04 no archive")
    assert load_predictions(tmp_path, (1, 2), outputs=2) is None
    assert load_predictions(tmp_path / "nowhere", (1, 2), outputs=2) is None


def test_trials_join_the_library_by_what_they_kept(recipes, tmp_path):
    recipe = recipes["cls"]
    indices = tuple(range(16))
    singles = [("default", untrained(recipe))]
    known, scores = judged(recipe, singles, metric="log_loss", indices=indices)
    targets = scores["default"].targets
    library = []
    for number in range(2):
        trained = replace(untrained(recipe, seed=number + 1), directory=tmp_path / str(number))
        trained.directory.mkdir()
        right = np.where((np.arange(16) % 2 == number)[:, None], np.eye(2)[targets] * 4, 0.0)
        kept = Predictions(trained.directory, ("val/auc", "max"))
        kept.take(indices, right)
        kept.keep(progress(0.7))
        library.append((f"trial-{number}", trained))
    found, more = further(recipe, singles, scores, known, direction="min", library=library)
    chosen = next(candidate for candidate in found if candidate.name.startswith("greedy"))
    assert {id(trained) for _, trained in library} <= {id(member) for member in chosen.members}
    assert more[chosen.name].value < scores["default"].value


def test_few_patients_are_not_fitted_to(recipes):
    recipe = recipes["cls"]
    singles = [(str(seed), untrained(recipe, seed)) for seed in range(3)]
    known, scores = judged(recipe, singles, metric="auc", indices=range(5))
    found, _ = further(recipe, singles, scores, known, direction="max")
    assert [candidate.name for candidate in found] == ["vote of 3"]


def test_scores_say_how_many_voxels_are_whose(recipes):
    found = judged(recipes["seg"], [("a", untrained(recipes["seg"]))], metric="dice", indices=(0, 1))[1]["a"]
    assert len(found.sampled) == 2 and sum(found.sampled) == len(found.targets)
    assert classified([[0.1, 0.2]], [0]).sampled == ()


# The contest ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def conclusion(recipes, tmp_path):
    """conclusion(select): what the last stage of a study with three finalists is made from."""
    from medray.config.schema import StudyConfig
    from medray.workflows.clock import Clock
    from medray.workflows.contest import Conclusion
    from medray.workflows.selecting import Quiet, make_chooser

    recipe = recipes["cls"]
    finalists = tuple((name, untrained(recipe, seed)) for seed, name in enumerate(("default", "a", "b")))

    def make(select=None):
        study = StudyConfig.model_validate({"select": select or {}})
        return Conclusion(
            directory=tmp_path, recipe=recipe, study=study, source="", command="", objective=("val/auc", "max"),
            finalists=finalists, records=(), importance={}, sampler="", clock=Clock(tmp_path / "clock.json", 1e6),
            chooser=make_chooser(study, {"val/auc": "max"}, ("val/auc", "max"), ["val/auc"]),
            quiet=Quiet(recipe=recipe, budget=1e6, tell=lambda _: None),
        )  # fmt: skip

    return make


def splits_of(recipe):
    return replace(recipe.splits(recipe.experiment()), val=tuple(range(16)))


def test_a_limit_decides_among_ensembles_and_single_networks_alike(conclusion):
    from medray.workflows.contest import hold_contest

    free = conclusion()
    one = sum(p.numel() for p in free.finalists[0][1].model.parameters())
    asked = conclusion({"limits": {"parameters": one}})
    contest = hold_contest(asked, splits_of(asked.recipe), "auc")
    assert len(contest.named(contest.winner).members) == 1 and contest.crowning is not None
    broken = {ranked.option.name for ranked in contest.crowning.ranked if ranked.broken}
    assert "average of 3" in broken and not broken & {"default", "a", "b"}
    assert hold_contest(free, splits_of(asked.recipe), "auc").crowning is None


def test_a_contest_ranks_all_that_can_be_made_and_names_the_best_single(conclusion):
    from medray.config.schema import StudyConfig
    from medray.workflows.contest import hold_contest

    asked = conclusion()
    splits = splits_of(asked.recipe)
    contest = hold_contest(asked, splits, "auc")
    names = [candidate.name for candidate in contest.candidates]
    assert names[:4] == ["default", "a", "b", "average of 3"] and "vote of 3" in names
    assert contest.single in ("default", "a", "b")
    assert contest.scores[contest.winner].value == max(found.value for found in contest.scores.values())
    alone, all_three = (contest.latency_ms(contest.named(name)) for name in ("a", "average of 3"))
    assert 0 < alone < all_three
    plain = replace(asked, study=StudyConfig(ensemble=False))
    assert [c.name for c in hold_contest(plain, splits, "auc").candidates] == ["default", "a", "b"]
