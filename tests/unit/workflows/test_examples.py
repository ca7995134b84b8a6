"""Example predictions: which case, when, and what the picture shows."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from medray.tracking import NullTracker
from medray.train.progress import Progress
from medray.workflows.examples import EVERY, Examples


class Store:
    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def image(self, i: int) -> Any:
        return np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(1, 32, 32)

    def mask(self, i: int) -> Any:
        mask = np.zeros((32, 32), np.uint8)
        mask[: self.sizes[i], :8] = 1
        return mask


class Album(NullTracker):
    def __init__(self) -> None:
        self.pictures: list[tuple[str, Any, int]] = []

    def picture(self, name: str, picture: Any, step: int = 0) -> None:
        self.pictures.append((name, picture, step))


def progress(step: int, fraction: float = 0.1) -> Progress:
    return Progress(epoch=1, step=step, fraction=fraction, seconds=1.0, metrics={})


def test_the_case_with_most_foreground_is_shown() -> None:
    examples = Examples(cast("Any", Store(0, 9, 4)), Album())
    assert examples.choose([0, 1, 2]) == 1 and examples.choose([0, 2]) == 2 and examples.choose([]) is None


def test_the_first_then_every_third_and_the_last_validation_have_a_picture() -> None:
    album = Album()
    examples = Examples(cast("Any", Store(9)), album)
    empty = np.zeros((32, 32), np.int64)
    for number in range(2 * EVERY + 2):
        examples.take(0, empty if number == 0 else cast("Any", Store(9)).mask(0))
        examples.draw(progress(10 * number, 1.0 if number == 2 * EVERY + 1 else 0.1))
    assert [step for _, _, step in album.pictures] == [0, 10 * EVERY, 20 * EVERY, 10 * (2 * EVERY + 1)]
    first, second = album.pictures[0][1], album.pictures[1][1]
    assert first.dtype == np.uint8 and first.shape[2] == 3
    half = first.shape[1] // 2
    assert (first[:, : half - 3] == second[:, : half - 3]).all()  # the reference stays
    assert (first[:, half + 3 :] != second[:, half + 3 :]).any()  # the answer has changed
    assert (second[:, : half - 3] == second[:, half + 3 :]).all()


def test_a_validation_that_found_nothing_to_show_has_no_picture() -> None:
    album = Album()
    examples = Examples(cast("Any", Store(9)), album)
    examples.draw(progress(1))
    assert album.pictures == []
