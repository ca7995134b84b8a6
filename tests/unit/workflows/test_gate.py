from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from medray.data.preprocess import OUTSIDE
from medray.learn.intervals import Interval
from medray.tasks.catalogue import find_task
from medray.workflows import gate
from medray.workflows.gate import Verdict, calibration_batches, score_bundle


def verdict(drop=0.0, before=10.0, after=5.0, packed=(3.0, 1.0), **more):
    return Verdict(
        metrics={"auc": (0.9, 0.9 - drop), **{name: (0.8, 0.8 - value) for name, value in more.items()}},
        drops={name: Interval(value, value - 0.01, value + 0.01) for name, value in {"auc": drop, **more}.items()},
        engines=("onnx fp32", "openvino int8"),
        latency_ms=(before, after),
        onnx_mb=(4.0, 1.0),
        packed_mb=packed,
        bundle_mb=(9.0, 6.0),
    )


@pytest.mark.parametrize("drop", [-0.1, 0.0, 0.005])
def test_what_loses_little_and_is_faster_may_stay(drop):
    assert verdict(drop).against(0.005) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (verdict(0.006), "auc drops by 0.0060"),
        (verdict(0.0, accuracy=0.2), "accuracy drops by 0.2000"),
        (verdict(float("nan")), "auc drops"),
        (verdict(after=10.0), "slower"),
        (verdict(after=20.0), "20 ms after 10"),
        (verdict(after=float("nan")), "slower"),
    ],
)
def test_what_loses_too_much_or_gains_nothing_may_not(given, words):
    assert words in given.against(0.005)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (verdict(after=10.2), ""),
        (verdict(after=9.0, packed=(3.0, 3.0)), ""),
        (verdict(after=10.0, packed=(3.0, 2.9)), "neither latency nor size shrank"),
        (verdict(after=9.8, packed=(3.0, 3.0)), "neither latency nor size shrank"),
        (verdict(after=11.0), "slower"),
        (verdict(0.006, after=10.0), "auc drops"),
    ],
)
def test_a_step_for_size_has_to_shrink_the_file_or_the_time_beyond_noise(given, words):
    found = given.against(0.005, "size")
    assert words in found and bool(found) == bool(words)


def test_it_says_drop_interval_speed_and_size():
    shown = verdict(0.004).shown
    for words in (
        "0.8960 after 0.9000",
        "95 % CI -0.0060 to +0.0140",
        "2.00 x as fast",
        "openvino int8",
        "1.00 MB",
        "packed 1.00",
    ):
        assert words in shown


def store_of(shapes, foreground=()):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, *shape)).astype(np.float32) for shape in shapes]
    return SimpleNamespace(
        image=lambda index: arrays[index], foreground=lambda index: np.array(foreground).reshape(-1, len(shapes[0]))
    )


def test_a_bundle_is_scored_at_the_temperature_by_which_it_decides(monkeypatch):
    task = find_task("ordinal")
    how = SimpleNamespace(flip_axes=())
    bundle = SimpleNamespace(
        spec=SimpleNamespace(task=task, inference=how, temperature=1.5),
        prepare=lambda _: (np.zeros((1, 4, 4), np.float32), None),
    )
    recipe = SimpleNamespace(
        manifest=SimpleNamespace(root=".", cases=[SimpleNamespace(group=str(i), label=2) for i in range(3)])
    )
    monkeypatch.setattr(gate, "read_case", lambda *_: (None, None, None))
    scores = score_bundle(bundle, lambda batch: np.full((len(batch), 4), 1.5, np.float32), recipe, range(3))
    decided = task.decide(task.probabilities(scores.logits / 1.5))
    assert decided.tolist() == [2, 2, 2] and task.decide(task.probabilities(scores.logits)).tolist() == [3, 3, 3]
    assert scores.task.measure("accuracy", *scores.arrays) == 1.0


def bundle_of(kind, patch=None, divisor=1):
    how = SimpleNamespace(patch_size=patch, divisor=divisor)
    return SimpleNamespace(spec=SimpleNamespace(task=find_task(kind), inference=how))


def test_a_classifier_is_calibrated_on_whole_images():
    store = store_of([(8, 8)] * 5)
    found = list(calibration_batches(bundle_of("classification"), store, range(5), 3, 0))
    assert [batch.shape for batch in found] == [(1, 1, 8, 8)] * 3
    assert (found[0][0] == store.image(0)).all() and (found[-1][0] == store.image(4)).all()


def test_a_segmenter_is_calibrated_on_its_windows_mostly_around_structures():
    store = store_of([(40, 12)] * 40, foreground=[[36, 6]])
    found = list(calibration_batches(bundle_of("segmentation", patch=(16, 16)), store, range(40), 40, 0))
    assert {batch.shape for batch in found} == {(1, 1, 16, 16)}
    assert all((batch[0, 0, :, :2] == OUTSIDE).all() for batch in found), "what juts out is padded as in training"
    holds = [np.isin(store.image(index)[0, 36, 6], batch) for index, batch in enumerate(found)]
    assert 0.6 < np.mean(holds) < 1.0


def test_whole_images_are_padded_to_what_the_network_takes():
    store = store_of([(9, 14)] * 2)
    (first, _) = calibration_batches(bundle_of("segmentation", divisor=8), store, range(2), 2, 0)
    assert first.shape == (1, 1, 16, 16)
