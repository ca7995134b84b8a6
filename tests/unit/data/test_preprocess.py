"""Preprocessing: geometry that goes there and back, normalisation, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medray.config.schema import PreprocessConfig
from medray.data.image import Image, Mask
from medray.data.manifest import IGNORE
from medray.data.preprocess import Geometry, Preprocessor, resize_linear, resize_nearest
from medray.errors import ConfigError, DataError


def image(shape: tuple[int, ...] = (1, 20, 24, 16), spacing: tuple[float, ...] | None = (1.0, 1.0, 1.0)) -> Image:
    array = np.random.default_rng(0).normal(5.0, 2.0, shape).astype(np.float32)
    return Image(array=array, spacing=spacing)


def blob(shape: tuple[int, ...], at: tuple[float, ...], radius: float) -> np.ndarray[Any, Any]:
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    return (np.linalg.norm(grid - np.array(at), axis=-1) < radius).astype(np.uint8)


def preprocessor(ndim: int = 3, channels: int = 1, **config: Any) -> Preprocessor:
    return Preprocessor(PreprocessConfig(**config), ndim=ndim, channels=channels)


def triangle(x: np.ndarray[Any, Any], m: int) -> np.ndarray[Any, Any]:
    """The anti-aliased linear resize of the last axis, in float64 and straight from its definition."""
    n = x.shape[-1]
    scale = max(n / m, 1.0)
    centre = (np.arange(m)[:, None] + 0.5) * n / m
    weight = np.maximum(0, 1 - np.abs(np.arange(n)[None] + 0.5 - centre) / scale)
    return x @ (weight / weight.sum(axis=1, keepdims=True)).T


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    size=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    channels=st.integers(1, 3),
)
def test_resize_linear_is_its_definition(shape: list[int], size: list[int], channels: int) -> None:
    """Over all shapes, since torch's own anti-aliasing is wrong for some (an image one pixel wide)."""
    array = np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)
    size = size[: len(shape)]
    expected = array.astype(np.float64)
    for axis, m in enumerate(size, start=1):
        expected = np.moveaxis(triangle(np.moveaxis(expected, axis, -1), m), -1, axis)
    np.testing.assert_allclose(resize_linear(array, size), expected, atol=2e-4)


def test_resize_nearest_takes_pixel_centres() -> None:
    labels = np.arange(6, dtype=np.uint8)[:, None]
    assert resize_nearest(labels, (3, 1)).ravel().tolist() == [1, 3, 5]
    assert resize_nearest(labels, (12, 1)).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert resize_nearest(labels, (2, 2)).shape == (2, 2)


@pytest.mark.parametrize("spacing", [(2.0, 0.7, 1.3), (0.5, 0.5, 3.0)])
def test_resampling_keeps_places_and_the_way_back_finds_them(spacing: tuple[float, ...]) -> None:
    shape, at = (30, 36, 24), (14.2, 20.5, 11.0)
    mask = Mask(array=blob(shape, at, 8), spacing=(1.0, 1.0, 1.0))
    scan = Image(array=mask.array[None].astype(np.float32), spacing=(1.0, 1.0, 1.0))
    chain = preprocessor(spacing=spacing, normalize="none")
    array, geometry = chain.prepare(scan)
    labels = chain.prepare_mask(mask, geometry)
    assert array.shape[1:] == labels.shape == geometry.prepared
    assert geometry.spacing == pytest.approx(spacing, rel=0.06)
    # the centre of mass, in the millimetres of the original, has not moved
    for prepared in (array[0] > 0.5, labels == 1):
        centre = (np.argwhere(prepared).mean(axis=0) + 0.5) * np.array(geometry.spacing) - 0.5
        np.testing.assert_allclose(centre, np.argwhere(mask.array).mean(axis=0), atol=0.1 * max(spacing))
    for back in (chain.restore_labels(labels, geometry), chain.restore(array, geometry)[0] > 0.5):
        overlap = 2 * np.logical_and(back, mask.array).sum() / (back.sum() + mask.array.sum())
        assert back.shape == shape and overlap > 0.9


def test_restore_argmax_is_restore_and_argmax() -> None:
    chain = preprocessor(spacing=(1.5, 0.8, 1.0), crop_foreground=True, pad_multiple=8)
    scan = image()
    scan.array[:, :4] = 0
    _, geometry = chain.prepare(scan)
    scores = np.random.default_rng(1).random((5, *geometry.prepared)).astype(np.float32)
    expected = chain.restore(scores, geometry).argmax(axis=0)
    np.testing.assert_array_equal(chain.restore_argmax(scores, geometry), expected)


def test_crop_and_pad_are_undone_exactly() -> None:
    scan = image((2, 21, 30, 17))
    scan.array[:, :5] = scan.array[:, :, 25:] = 0
    chain = preprocessor(channels=2, crop_foreground=True, pad_multiple=8, normalize="none")
    array, geometry = chain.prepare(scan)
    assert geometry.crop == ((5, 21), (0, 25), (0, 17)) and geometry.prepared == (16, 32, 24)
    np.testing.assert_array_equal(chain.restore(array, geometry), scan.array)
    mask = Mask(array=blob((21, 30, 17), (12, 12, 8), 4), spacing=None)
    labels = chain.prepare_mask(mask, geometry)
    assert (labels[:, :3] == IGNORE).all()
    assert (labels == 1).sum() == mask.array.sum()


def test_size_in_two_dimensions() -> None:
    array, geometry = preprocessor(ndim=2, channels=3, size=(32, 20)).prepare(image((3, 50, 41), None))
    assert array.shape == (3, 32, 20) and geometry.spacing is None


def test_labels_stay_labels_and_valid_masks_them() -> None:
    shape = (40, 40)
    labels = blob(shape, (15, 15), 9) * 7
    labels[30:, 30:] = IGNORE
    valid = np.ones(shape, np.uint8)
    valid[:10] = 0
    chain = preprocessor(ndim=2, size=(23, 31))
    _, geometry = chain.prepare(image((1, *shape), None))
    out = chain.prepare_mask(Mask(array=labels, spacing=None), geometry, Mask(array=valid, spacing=None))
    assert set(np.unique(out)) == {0, 7, IGNORE}
    assert (out[:5] == IGNORE).all() and (out[-3:, -3:] == IGNORE).all() and out[9, 12] == 7


def test_zscore_leaves_a_constant_background_out() -> None:
    scan = image()
    scan.array[:, :10] = -50
    array, _ = preprocessor().prepare(scan)
    tissue = array[:, 10:]
    assert abs(tissue.mean()) < 1e-4 and tissue.std() == pytest.approx(1, abs=1e-4)
    assert array[0, 0, 0, 0] < -10


def test_zscore_of_a_constant_image_is_zero() -> None:
    array, _ = preprocessor().prepare(Image(array=np.full((1, 4, 4, 4), 7, np.float32), spacing=None))
    assert (array == 0).all()


def test_ct_and_range() -> None:
    scan = Image(array=np.array([[[-2000.0, 0.0], [100.0, np.nan]]], np.float32), spacing=None)
    ct, _ = preprocessor(ndim=2, normalize="ct", clip=((-1000, 1000),), mean=(100,), std=(50,)).prepare(scan)
    np.testing.assert_allclose(ct[0], [[-22, -2], [0, -22]])
    spread, _ = preprocessor(ndim=2, normalize="range", clip=((0, 200),)).prepare(scan)
    np.testing.assert_allclose(spread[0], [[-1, -1], [0, -1]])


def test_the_input_is_left_alone() -> None:
    scan = image()
    before = scan.array.copy()
    preprocessor(clip=((0, 1),)).prepare(scan)
    np.testing.assert_array_equal(scan.array, before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"spacing": (1.0, 1.0)}, "has 2 values, the images have 3 axes"),
        ({"size": (8, 8, 0)}, "at least 1"),
        ({"size": (8, 8, 8), "spacing": (1.0, 1.0, 1.0)}, "exclude each other"),
        ({"normalize": "ct"}, r"needs preprocess\.clip"),
        ({"normalize": "ct", "clip": ((0, 1),)}, r"needs preprocess\.mean"),
        ({"normalize": "range"}, r"needs preprocess\.clip"),
        ({"clip": ((0, 1), (0, 1))}, "1 channel"),
        ({"clip": ((1, 1),)}, "must be below"),
    ],
)
def test_configurations_that_do_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocessor(**config)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="2 channel"):
        preprocessor().prepare(image((2, 4, 4, 4)))
    with pytest.raises(DataError, match="no pixel spacing"):
        preprocessor(spacing=(1.0, 1.0, 1.0)).prepare(image(spacing=None))
    with pytest.raises(DataError, match="over the limit"):
        preprocessor(spacing=(0.001, 0.001, 0.001)).prepare(image())
    chain = preprocessor()
    _, geometry = chain.prepare(image())
    with pytest.raises(DataError, match="same grid"):
        chain.prepare_mask(Mask(array=np.zeros((3, 3, 3), np.uint8), spacing=None), geometry)
    with pytest.raises(DataError, match=r"labels 0\.\.300"):
        chain.prepare_mask(Mask(array=blob((20, 24, 16), (9, 9, 9), 3) * np.int32(300), spacing=None), geometry)


def test_memory_does_not_grow_with_classes() -> None:
    """A mask of 100 classes is resampled without 100 volumes at once."""
    import tracemalloc

    shape = (64, 64, 64)
    labels = np.random.default_rng(0).integers(0, 100, shape).astype(np.uint8)
    geometry = Geometry(shape=shape, crop=((0, 64),) * 3, resized=(48, 48, 48), pad=((0, 0),) * 3, spacing=None)
    tracemalloc.start()
    preprocessor().prepare_mask(Mask(array=labels, spacing=None), geometry)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 4 * 64**3


def test_a_real_volume_there_and_back(shared_data: Path) -> None:
    import nibabel as nib

    labels = np.asarray(nib.load(sorted((shared_data / "msd_hippocampus/labelsTr").glob("h*.nii.gz"))[0]).dataobj)
    mask = Mask(array=labels.astype(np.uint8), spacing=(1.0, 1.0, 1.0))
    chain = preprocessor(spacing=(0.8, 1.1, 0.9))
    _, geometry = chain.prepare(Image(array=labels[None].astype(np.float32), spacing=(1.0, 1.0, 1.0)))
    prepared = chain.prepare_mask(mask, geometry)
    onehot = np.stack([prepared == k for k in range(3)]).astype(np.float32)
    back = chain.restore_argmax(onehot, geometry)
    for k in (1, 2):
        both = np.logical_and(back == k, labels == k).sum()
        assert 2 * both / ((back == k).sum() + (labels == k).sum()) > 0.93
