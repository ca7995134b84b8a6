"""Pictures for a report: which side is where, which slice is shown, how large."""

from __future__ import annotations

import numpy as np
import pytest

from medray.data.image import Image
from medray.data.manifest import IGNORE
from medray.workflows.pictures import LARGEST, beside, plane, show

RIGHT, LEFT, ANTERIOR, POSTERIOR = (
    19,
    0,
    15,
    0,
)  # of 20 x 16 x 8 voxels, RAS


def volume(*marks: tuple[int, int, int]) -> Image:
    array = np.zeros((1, 20, 16, 8), np.float32)
    for mark in marks:
        array[(0, *mark)] = 1.0
    return Image(array=array, spacing=(1.0, 1.0, 1.0))


def labels(*marks: tuple[int, int, int], value: int = 1):
    table = np.zeros((20, 16, 8), np.uint8)
    for mark in marks:
        table[mark] = value
    return table


@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [(RIGHT, 8, 7, 0), (LEFT, 8, 7, 19), (10, ANTERIOR, 0, 9), (10, POSTERIOR, 15, 9), (RIGHT, ANTERIOR, 0, 0)],
    ids=["right", "left", "anterior", "posterior", "corner"],
)
def test_the_patients_right_is_at_the_pictures_left_and_the_front_on_top(x, y, row, column):
    array, flat = plane(volume((x, y, 4)), labels((x, y, 4)))
    assert array.shape == (1, 16, 20) and flat.shape == (16, 20)
    assert np.argwhere(array[0]).tolist() == [[row, column]] == np.argwhere(flat).tolist()


def test_the_slice_with_most_foreground_is_shown():
    marked = labels((3, 3, 1), (4, 4, 6), (5, 5, 6))
    array, flat = plane(volume((4, 4, 6)), marked)
    assert flat.sum() == 2 and array.sum() == 1


def test_where_nothing_is_marked_the_middle_is_shown():
    array, flat = plane(volume((0, 0, 4)), None)
    assert array.sum() == 1 and flat is None
    ignored = np.full((20, 16, 8), IGNORE, np.uint8)
    assert plane(volume((0, 0, 4)), ignored)[0].sum() == 1


def test_a_picture_is_shown_as_it_is():
    array = np.random.default_rng(0).random((3, 12, 10)).astype(np.float32)
    image = Image(array=array, spacing=None)
    mask = np.zeros((12, 10), np.uint8)
    found = plane(image, mask)
    assert found[0] is array and found[1] is mask


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 100, 90), (1, 400, 900), (1, 8, 3000)])
def test_pictures_are_neither_tiny_nor_huge(shape):
    pixels = show(Image(array=np.random.default_rng(0).random(shape).astype(np.float32), spacing=None))
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert max(pixels.shape[:2]) <= LARGEST + 8 and max(pixels.shape[:2]) >= LARGEST // 4


def test_labels_are_tinted_and_what_is_ignored_is_not():
    image = Image(array=np.zeros((1, 200, 200), np.float32), spacing=None)
    mask = np.zeros((200, 200), np.uint8)
    plain = show(image, mask)
    mask[50:100, 50:100] = IGNORE
    np.testing.assert_array_equal(show(image, mask), plain)
    mask[50:100, 50:100] = 1
    assert (show(image, mask)[60, 60] != plain[60, 60]).any()


def test_reference_stands_left_and_prediction_right_on_the_same_slice():
    """The reference has a voxel at the patient's right, the prediction one at the left."""
    image = volume((RIGHT, 8, 2))
    both = beside(image, labels((RIGHT, 8, 2)), labels((LEFT, 8, 2)))
    single = show(image, labels((RIGHT, 8, 2)))
    width = single.shape[1]
    assert both.shape == (single.shape[0], 2 * width + 6, 3)
    np.testing.assert_array_equal(both[:, :width], single)
    coloured = np.ptp(both.astype(int), axis=2) > 0
    assert coloured[:, : width // 2].any() and not coloured[:, width // 2 : width].any()
    right = coloured[:, width + 6 :]
    assert right[:, width // 2 :].any() and not right[:, : width // 2].any()


def test_a_prediction_without_reference_is_still_shown():
    both = beside(volume(), labels(), labels((LEFT, 8, 4)))
    assert (np.ptp(both.astype(int), axis=2) > 0).any()
