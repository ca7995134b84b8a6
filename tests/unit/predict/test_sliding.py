from __future__ import annotations

import numpy as np
import pytest

from medray.data.preprocess import OUTSIDE
from medray.errors import ModelError
from medray.learn.activations import softmax
from medray.predict import sliding
from medray.predict.sliding import _slabs, classify, segment, segment_labels


def pointwise(batch):
    """Logits that depend on each voxel alone: whatever the windows, the answer must be the same."""
    return np.stack([batch[:, 0], -batch[:, 0], 0.5 * batch[:, 0] ** 2 - 1], axis=1).astype(np.float32)


def image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(20, 33, 17), (8, 8, 8), (5, 40, 6)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_windows_of_a_pointwise_network_give_the_whole_image(shape, overlap):
    array = image(*shape)
    found = segment(pointwise, array, patch_size=(8, 8, 8), overlap=overlap, batch_size=3)
    np.testing.assert_allclose(found, softmax(pointwise(array[None]))[0], atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=0), 1.0, atol=1e-5)


def test_a_whole_image_is_padded_to_the_divisor_and_cut_back():
    seen = []

    def network(batch):
        seen.append(batch.shape)
        return pointwise(batch)

    array = image(19, 30)
    found = segment(network, array, patch_size=None, divisor=(8, 16))
    assert seen == [(1, 1, 24, 32)]
    np.testing.assert_allclose(found, softmax(pointwise(array[None]))[0], atol=1e-6)


def test_padding_is_what_training_has_outside():
    seen = []

    def network(batch):
        seen.append(batch.copy())
        return pointwise(batch)

    array = np.full((1, 4, 4), 3.0, dtype=np.float32)
    segment(network, array, patch_size=(8, 8))
    inside = np.zeros((8, 8), dtype=bool)
    inside[2:6, 2:6] = True
    assert (seen[0][0, 0][inside] == 3.0).all() and (seen[0][0, 0][~inside] == OUTSIDE).all()


def test_mirror_averaging_undoes_each_mirror():
    def leaning(batch):
        """Gives each voxel its right neighbour's value: mirrored, it is the left one's."""
        moved = np.roll(batch[:, 0], -1, axis=1)
        return np.stack([moved, np.zeros_like(moved)], axis=1)

    array = image(6, 5)
    expected = (softmax(leaning(array[None])) + softmax(np.stack([np.roll(array[0], 1, 0), 0 * array[0]])[None])) / 2
    found = segment(leaning, array, patch_size=None, flip_axes=(0,))
    np.testing.assert_allclose(found, expected[0], atol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("size", [16, 17, 40, 63])
@pytest.mark.parametrize("most", [1, 10, 25, 100])
def test_slabs_tile_the_axis_and_give_the_same_labels(overlap, size, most):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(3, 8, 8)).astype(np.float32)

    def positional(batch):
        """Depends on the place within the window, so that any other grid of windows is seen."""
        return (batch[:, :1] * weights[None]).astype(np.float32)

    array = image(size, 12, seed=2)
    done = 0
    for slab, inner, core in _slabs(size, 8, overlap, most):
        assert core.start == done
        assert slab.start + inner.start == core.start
        assert inner.stop - inner.start == core.stop - core.start > 0
        done = core.stop
    assert done == size
    whole = segment(positional, array, patch_size=(8, 8), overlap=overlap)
    found = segment_labels(
        positional, array, patch_size=(8, 8), num_classes=3, overlap=overlap, limit_bytes=most * 3 * 4 * 12
    )
    top = np.sort(whole, axis=0)
    sure = top[-1] - top[-2] > 1e-5
    assert sure.mean() > 0.99
    assert (found == whole.argmax(axis=0))[sure].all()


def test_slabs_hold_no_more_than_asked_for(monkeypatch):
    sizes = []

    def recording(predictor, array, **how):
        sizes.append(array.shape)
        return segment(predictor, array, **how)

    monkeypatch.setattr(sliding, "segment", recording)
    segment_labels(pointwise, image(200, 8), patch_size=(8, 8), num_classes=3, limit_bytes=40 * 8 * 3 * 4)
    assert max(shape[1] for shape in sizes) <= 40
    assert len(sizes) > 4


def test_classify_averages_logits_over_mirrors_in_batches():
    calls = []

    def network(batch):
        calls.append(len(batch))
        return np.stack([batch[:, 0, 0, 0], batch[:, 0, 0, -1]], axis=1)

    arrays = np.stack([image(4, 4, seed=seed) for seed in range(5)])
    found = classify(network, arrays, flip_axes=(1,), batch_size=2)
    mean = (arrays[:, 0, 0, 0] + arrays[:, 0, 0, -1]) / 2
    np.testing.assert_allclose(found, np.stack([mean, mean], axis=1), atol=1e-6)
    assert max(calls) == 2


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"patch_size": (8, 8)}, "3 positive"),
        ({"patch_size": (8, 8, 8), "overlap": 1.0}, "below 1"),
        ({"patch_size": None, "flip_axes": (3,)}, "0 to 2"),
        ({"patch_size": None, "flip_axes": (0, 0)}, "different"),
    ],
)
def test_what_does_not_fit_is_said(how, says):
    with pytest.raises(ModelError, match=says):
        segment(pointwise, image(8, 8, 8), **how)


def test_a_network_of_another_output_shape_is_refused():
    with pytest.raises(ModelError, match="segmentation model gives"):
        segment(lambda batch: batch[:, :, 0], image(8, 8), patch_size=None)
