"""Candidates, their scores, the choice among them and the gain; how a network is judged while it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medray.bundle.ensemble import EnsembleModel
from medray.data.image import Image, Mask
from medray.data.manifest import IGNORE
from medray.data.readers import read_case
from medray.tasks.catalogue import find_task
from medray.train.progress import FitResult
from medray.train.runtime import LocalRuntime
from medray.workflows import champion as choosing
from medray.workflows import conclusion
from medray.workflows.champion import Candidate, Scores, candidates_of, choose, difference, score
from medray.workflows.conclusion import _sites
from medray.workflows.judging import make_validate, predictor_of, spread
from medray.workflows.planning import prepare_directory
from medray.workflows.recipe import Recipe
from medray.workflows.results import classification_results, data_summary, segmentation_results
from medray.workflows.training import Trained, new_model, open_store

SMALL = {
    "seg": {"model": {"name": "unet", "feature_size": 4, "depth": 2, "deep_supervision": False},
            "train": {"patch_size": [16, 16, 16]}, "preprocess": {"spacing": None}},
    "cls": {"model": {"name": "small_cnn", "feature_size": 4}},
    "multi": {"model": {"name": "small_cnn", "feature_size": 4}},
    "graded": {"model": {"name": "small_cnn", "feature_size": 4}},
}  # fmt: skip
SOURCES = {
    "seg": "phantom://ct-lesions?cases=6&size=16",
    "cls": "phantom://xray-nodules?cases=14&size=32",
    "multi": "phantom://xray-findings?cases=14&size=32",
    "graded": "phantom://xray-effusion?cases=14&size=32",
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    made = {}
    for name, source in SOURCES.items():
        folder = tmp_path_factory.mktemp(name)
        prepare_directory(source, folder)
        explicit = SMALL[name] | {"device": "cpu"}
        explicit["train"] = {"precision": "fp32"} | explicit.get("train", {})
        made[name] = Recipe(directory=str(folder), explicit=explicit, cache=str(folder / "cache"))
    return made


def untrained(recipe, seed=0, **params) -> Trained:
    """A network as training would leave it, its weights drawn from ``seed``."""
    experiment = recipe.experiment(params).model_copy(update={"seed": seed})
    fit = FitResult(
        best={}, best_epoch=0, history=(), epochs=0, steps=0, seconds=0.0, stopped="finished", weights={},
        peak_memory_mb=0.0, step_seconds=0.0, micro_batch=1,
    )  # fmt: skip
    model = new_model(experiment, recipe.manifest).eval()
    return Trained(model=model, experiment=experiment, fit=fit, directory=Path())


def classified(logits, targets, *, metric="auc", kind="classification"):
    logits, targets = np.asarray(logits, np.float32), np.asarray(targets)
    groups = np.asarray([str(i) for i in range(len(logits))])
    return Scores(
        kind=kind, metric=metric, indices=tuple(range(len(logits))), groups=groups, logits=logits, targets=targets
    )


def segmented(dice):
    table = np.asarray(dice, dtype=np.float64).reshape(len(dice), -1)
    groups = np.asarray([str(i) for i in range(len(dice))])
    return Scores(kind="segmentation", indices=tuple(range(len(dice))), groups=groups, dice=table)


def test_figures_are_those_of_the_temperature_that_decides():
    """Four steps of probability 0.82 make grade 3 (0.82**3 > 0.5 > 0.82**4), four of 0.73 make grade 2."""
    raw = classified([[1.5] * 4] * 3, [2, 2, 2], metric="accuracy", kind="ordinal")
    bundles = replace(raw, temperature=1.5)
    assert raw.value == 0.0 and bundles.value == 1.0
    assert bundles.interval().value == 1.0 and bundles.intervals()["mae"].value == 0.0
    assert difference(bundles, raw).value == 1.0


def test_champion_and_default_are_measured_at_the_temperatures_of_their_bundles(monkeypatch):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(400, 3))
    p = find_task("ordinal").probabilities(logits)
    grades = (rng.random((400, 1)) > p.cumsum(1)).sum(1).clip(max=3)
    validation = {
        name: classified(factor * logits, grades, metric="kappa", kind="ordinal")
        for name, factor in (("default", 1.0), ("trial-1", 3.0))
    }
    monkeypatch.setattr(conclusion.choosing, "score", lambda *_, **__: dict(validation))
    found = conclusion._measured(None, [], (0,), "kappa", validation)
    assert found["default"].temperature == pytest.approx(1.0, rel=0.2)
    assert found["trial-1"].temperature == pytest.approx(3 * found["default"].temperature, rel=0.02)
    assert found["trial-1"].value == pytest.approx(found["default"].value, abs=0.02) != validation["trial-1"].value


# The choice ----------------------------------------------------------------------------------------------------------


def test_the_best_validation_score_wins():
    scores = {"default": segmented([0.5, 0.6]), "trial-3": segmented([0.7, 0.8]), "average": segmented([0.6, 0.8])}
    assert choose(scores, "default", "max") == "trial-3"
    assert choose(scores, "default", "min") == "default"


def test_on_a_tie_the_smaller_log_loss_wins_then_the_earlier():
    """Both order all cases rightly, one of them with more conviction."""
    targets = [0, 0, 1, 1]
    shy = classified([[0.1, 0], [0.1, 0], [0, 0.1], [0, 0.1]], targets)
    sure = classified([[3, 0], [3, 0], [0, 3], [0, 3]], targets)
    assert shy.value == sure.value == 1.0
    assert choose({"default": shy, "trial-1": sure}, "default", "max") == "trial-1"
    assert choose({"default": sure, "trial-1": shy}, "default", "max") == "default"
    assert choose({"default": sure, "twin": sure}, "default", "max") == "default"
    assert choose({"default": segmented([0.5]), "twin": segmented([0.5 + 1e-9])}, "default", "max") == "default"


def test_a_candidate_without_a_score_never_wins_over_one_with():
    nothing = segmented([np.nan, np.nan])
    assert choose({"default": nothing, "trial-1": segmented([0.1])}, "default", "max") == "trial-1"
    assert choose({"default": nothing, "trial-1": nothing}, "default", "max") == "default"
    one_class = classified([[1, 0], [0, 1]], [1, 1])
    assert not np.isfinite(one_class.value)
    assert choose({"default": one_class, "trial-1": one_class}, "default", "max") == "default"


def test_a_metric_to_be_minimised_is():
    targets = [0, 0, 1, 1]
    shy = classified([[0.1, 0], [0.1, 0], [0, 0.1], [0, 0.1]], targets, metric="log_loss")
    sure = classified([[3, 0], [3, 0], [0, 3], [0, 3]], targets, metric="log_loss")
    assert choose({"default": shy, "trial-1": sure}, "default", "min") == "trial-1"


def test_the_gain_is_champion_minus_default():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.8, 30)
    better, worse = segmented(base + 0.1), segmented(base)
    gain = difference(better, worse)
    assert gain.value == pytest.approx(0.1) and gain.low > 0
    assert difference(worse, better).value == pytest.approx(-0.1)
    same = difference(worse, worse)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_cases_without_the_class_count_for_nothing():
    assert segmented([[0.5, np.nan], [0.7, np.nan]]).value == pytest.approx(0.6)
    assert np.isnan(segmented([[np.nan]]).value)


# Candidates ----------------------------------------------------------------------------------------------------------


def names(candidates):
    return [candidate.name for candidate in candidates]


def test_finalists_that_see_alike_are_averaged_and_stirred(recipes):
    recipe = recipes["seg"]
    finalists = [("default", untrained(recipe)), ("default-twin-1", untrained(recipe, seed=1))]
    assert names(candidates_of(recipe, finalists, ensemble=False)) == ["default", "default-twin-1"]
    assert names(candidates_of(recipe, finalists[:1], ensemble=True)) == ["default"]
    found = candidates_of(recipe, finalists, ensemble=True)
    assert names(found) == ["default", "default-twin-1", "average of 2", "soup of 2"]
    assert found[2].members == (finalists[0][1], finalists[1][1])
    soup = found[3].lead.model.state_dict()
    for name, tensor in finalists[0][1].model.state_dict().items():
        other = finalists[1][1].model.state_dict()[name]
        torch.testing.assert_close(soup[name], (tensor + other) / 2)
    assert not found[3].lead.model.training


def test_other_networks_are_averaged_and_not_stirred(recipes):
    recipe = recipes["seg"]
    finalists = [("default", untrained(recipe)), ("trial-1", untrained(recipe, **{"model.feature_size": 8}))]
    assert names(candidates_of(recipe, finalists, ensemble=True)) == ["default", "trial-1", "average of 2"]


@pytest.mark.parametrize(
    "params",
    [{"preprocess.normalize": "zscore"}, {"train.patch_size": [16, 16, 8]}, {"inference.overlap": 0.75}],
    ids=str,
)
def test_what_sees_images_otherwise_is_not_averaged(recipes, params):
    """A bundle prepares images and lays windows in one way for all its members."""
    recipe = recipes["seg"]
    finalists = [("default", untrained(recipe)), ("trial-1", untrained(recipe, **params))]
    assert names(candidates_of(recipe, finalists, ensemble=True)) == ["default", "trial-1"]


def test_batch_statistics_are_not_stirred(recipes):
    recipe = recipes["cls"]
    pair = [untrained(recipe), untrained(recipe, seed=1)]
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pair[0].model.modules()):
        for trained in pair:
            trained.model.add_module("norm", nn.BatchNorm2d(4))
    found = candidates_of(recipe, list(zip(("default", "twin"), pair, strict=True)), ensemble=True)
    assert names(found) == ["default", "twin", "average of 2"]


@pytest.mark.parametrize("kind", ["classification", "multilabel", "ordinal"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4], ids=["mild", "sure", "certain"])
def test_averaged_logits_are_the_bundles(kind, scale):
    """What is chosen and calibrated here is what the bundle's one graph will say."""
    torch.manual_seed(0)
    parts = [torch.randn(5, 3) * scale for _ in range(3)]
    members = [Answering(part) for part in parts]
    expected = EnsembleModel(members, kind)(torch.zeros(5, 1)).numpy()
    found = np.stack(
        [choosing._mean_logits([part[row].numpy() for part in parts], find_task(kind)) for row in range(5)]
    )
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class Answering(nn.Module):
    """A network that says the same to everything."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


def test_an_averaged_segmentation_is_the_bundles(recipes):
    """Mean of probabilities over windows against the ensemble's one graph over the same windows."""
    recipe = recipes["seg"]
    pair = (untrained(recipe), untrained(recipe, seed=1))
    one_graph = Trained(
        model=EnsembleModel([m.model for m in pair], "segmentation").eval(), experiment=pair[0].experiment,
        fit=pair[0].fit, directory=Path(),
    )  # fmt: skip
    image, _, _ = read_case(recipe.manifest.cases[0], Path(recipe.manifest.root))
    ours = choosing.labels_of(recipe, Candidate(name="average", members=pair), image)
    bundles = choosing.labels_of(recipe, Candidate(name="graph", members=(one_graph,)), image)
    assert ours.shape == image.shape
    assert (ours == bundles).mean() > 0.999


# Scores --------------------------------------------------------------------------------------------------------------


def test_segmentations_are_scored_on_the_images_own_grid(recipes):
    recipe = recipes["seg"]
    pair = [Candidate(name=str(seed), members=(untrained(recipe, seed),)) for seed in (0, 1)]
    both = Candidate(name="average", members=tuple(c.lead for c in pair))
    found = score(recipe, [*pair, both], (0, 1, 2), metric="dice", distances=True)
    for scores in found.values():
        assert scores.indices == (0, 1, 2) and scores.dice.shape == (3, 2) == scores.hd95.shape
        assert scores.groups.tolist() == [recipe.manifest.cases[i].group for i in range(3)]
        assert np.isfinite(choosing.temperature_of(scores))
    image, mask, _ = read_case(recipe.manifest.cases[1], Path(recipe.manifest.root))
    labels = choosing.labels_of(recipe, both, image)
    for k in (1, 2):
        ours, truth = labels == k, mask.array == k
        expected = 2 * (ours & truth).sum() / (ours.sum() + truth.sum())
        assert found["average"].dice[1, k - 1] == pytest.approx(expected)


def test_what_is_corrupted_is_the_image_as_read(recipes):
    recipe = recipes["cls"]
    candidate = Candidate(name="default", members=(untrained(recipe),))
    seen = []

    def flatten(image: Image) -> Image:
        seen.append(image.shape)
        return Image(array=np.zeros_like(image.array), spacing=image.spacing)

    plain = score(recipe, [candidate], (0, 1, 2), metric="auc")["default"]
    flat = score(recipe, [candidate], (0, 1, 2), metric="auc", corrupt=flatten)["default"]
    assert len(seen) == 3 and plain.logits.shape == (3, 2) == flat.logits.shape
    assert np.ptp(flat.logits, axis=0).max() < 1e-5 < np.ptp(plain.logits, axis=0).max()


def test_scoring_may_stop_early_but_not_with_nothing(recipes):
    recipe = recipes["cls"]
    candidate = Candidate(name="default", members=(untrained(recipe),))
    assert score(recipe, [candidate], (3, 4, 5), metric="auc", stop=lambda: True)["default"].indices == (3,)


def test_every_metric_has_an_interval(recipes):
    recipe = recipes["multi"]
    candidate = Candidate(name="default", members=(untrained(recipe),))
    scores = score(recipe, [candidate], range(14), metric="auc")["default"]
    found = scores.intervals()
    assert found["auc"].value == pytest.approx(scores.value)
    assert all(i.low <= i.value <= i.high for i in found.values() if np.isfinite([i.low, i.value, i.high]).all())


def test_metrics_agree_with_the_fast_way():
    rng = np.random.default_rng(1)
    for classes in (2, 3):
        share = rng.dirichlet(np.ones(classes), 40)
        targets = np.arange(40) % classes
        assert find_task("classification").measure("auc", targets, share) == pytest.approx(
            find_task("classification").measures(targets, share)["auc"]
        )


def test_validation_while_training_sees_what_the_end_sees(recipes):
    """On an unchanged grid and whole images, the cheap measure and the final one are the same number."""
    for name, metric in (("cls", "auc"), ("multi", "auc"), ("seg", "dice")):
        recipe = recipes[name]
        trained = untrained(recipe)
        kind, classes = recipe.manifest.task, len(recipe.manifest.classes)
        indices = tuple(range(len(recipe.manifest.cases)))
        store = open_store(recipe, trained.experiment)
        validate = make_validate(
            store, indices, trained.experiment, kind=kind, num_classes=classes, runtime=LocalRuntime()
        )
        end = score(recipe, [Candidate(name="x", members=(trained,))], indices, metric=metric)["x"].value
        assert validate(trained.model)[f"val/{metric}"] == pytest.approx(end, abs=1e-4), name


def test_a_mask_without_any_class_gives_zero_rather_than_nothing(recipes):
    """fit() compares numbers: an undefined Dice would never be the best, and never be seen."""

    class Empty:
        def image(self, index):
            return np.zeros((1, 16, 16, 16), np.float32)

        def mask(self, index):
            return np.full((16, 16, 16), IGNORE, np.uint8)

    recipe = recipes["seg"]
    trained = untrained(recipe)
    validate = make_validate(
        Empty(), (0,), trained.experiment, kind="segmentation", num_classes=3, runtime=LocalRuntime()
    )
    assert validate(trained.model) == {"val/dice": 0.0}


def test_a_predictor_gives_float32_logits(recipes):
    trained = untrained(recipes["cls"])
    answer = predictor_of(trained.model, trained.experiment, torch.device("cpu"))(np.zeros((2, 1, 32, 32), np.float32))
    assert answer.dtype == np.float32 and answer.shape == (2, 2)


# Parts of the report -------------------------------------------------------------------------------------------------


def test_the_data_are_summed_up_with_pictures(recipes):
    for name in recipes:
        recipe = recipes[name]
        splits = recipe.splits(recipe.experiment())
        found = data_summary(recipe, SOURCES[name], splits)
        assert found.cases == sum(found.splits.values()) == len(recipe.manifest.cases)
        assert 1 <= len(found.examples) <= 6
        assert all(p.pixels.dtype == np.uint8 and p.pixels.shape[2] == 3 for p in found.examples)
        assert ("mm" in found.spacing) == (recipe.fingerprint.spacing_median is not None)


def test_a_segmenter_is_shown_at_its_best_median_and_worst(recipes):
    recipe = recipes["seg"]
    candidate = Candidate(name="default", members=(untrained(recipe),))
    scores = score(recipe, [candidate], (0, 1, 2), metric="dice")["default"]
    found = segmentation_results(recipe, candidate, scores)
    assert [p.caption.split(":")[0] for p in found.overlays] == ["best", "median", "worst"]
    dice = [float(p.caption.split("Dice ")[1].split(".  ")[0].split(". ")[0]) for p in found.overlays]
    assert dice == sorted(dice, reverse=True)
    assert set(found.per_class) == {"liver", "lesion"} and found.hd95_unit == "mm"
    assert all(np.isnan(row.hd95).all() for row in found.cases)  # distances were not asked for


@pytest.mark.parametrize("name", ["cls", "multi", "graded"])
def test_a_classifier_is_shown_by_curves(recipes, name):
    recipe = recipes[name]
    candidate = Candidate(name="default", members=(untrained(recipe),))
    scores = score(recipe, [candidate], range(14), metric="auc")["default"]
    found = classification_results(recipe, scores, 1.5)
    classes = recipe.manifest.classes
    assert found.temperature == 1.5
    if name == "multi":
        assert found.confusion is None, "rows of true against columns of predicted need one class a case"
    else:
        assert found.confusion.shape == (len(classes),) * 2 and found.confusion.sum() == 14
    known = {"small or more", "moderate or more", "large"} if name == "graded" else set(classes)
    assert {c.name for c in found.roc} <= known and all(0 <= c.area <= 1 for c in (*found.roc, *found.pr))
    assert [c.name for c in found.reliability] == ["before", "after"]
    if name == "cls":
        assert found.confusion.sum() == 14 and [c.name for c in found.roc] == ["nodule"]


def test_one_class_alone_has_no_curve(recipes):
    found = classification_results(recipes["cls"], classified([[1.0, 0.0], [2.0, 0.0]], [0, 0]), 1.0)
    assert found.roc == () and found.pr == ()


def test_sites_are_told_apart_where_there_are_several(recipes):
    recipe = recipes["cls"]
    candidate = Candidate(name="default", members=(untrained(recipe),))
    scores = score(recipe, [candidate], range(14), metric="accuracy")["default"]
    rows = _sites(recipe, scores)
    assert len(rows) >= 2 and sum(row.cases for row in rows) == 14
    one = next(i for i, case in enumerate(recipe.manifest.cases) if case.site == rows[0].site)
    assert _sites(recipe, score(recipe, [candidate], (one,), metric="accuracy")["default"]) == ()


def test_spread_takes_the_ends_and_no_case_twice():
    assert spread(range(3), 5) == [0, 1, 2]
    found = spread(range(10, 110), 7)
    assert len(set(found)) == 7 and (found[0], found[-1]) == (10, 109)


def test_masks_are_on_the_images_grid(recipes):
    image, mask, _ = read_case(recipes["seg"].manifest.cases[0], Path(recipes["seg"].manifest.root))
    assert isinstance(mask, Mask) and mask.array.shape == image.shape
