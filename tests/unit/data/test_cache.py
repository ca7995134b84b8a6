"""PreparedStore: what was prepared comes back, in any process, after any interruption."""

from __future__ import annotations

import mmap
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from medray.config.schema import PreprocessConfig
from medray.data import cache
from medray.data.cache import PreparedStore
from medray.data.manifest import IGNORE, Case, Manifest
from medray.data.preprocess import Preprocessor
from medray.data.readers import read_case
from medray.errors import DataError, UnreadableError


def folder_of_pictures(root: Path, *, n: int = 5, task: str = "segmentation", **kwargs: Any) -> Manifest:
    """Pictures of different sizes with masks of two classes."""
    rng = np.random.default_rng(0)
    cases = []
    for i in range(n):
        shape = (20 + i, 31 - i)
        Picture.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(root / f"i{i}.png")
        mask = np.zeros(shape, np.uint8)
        mask[4:9, 5:10] = 1
        mask[12:15, 12 : 15 + i] = 2
        Picture.fromarray(mask).save(root / f"m{i}.png")
        target = {"mask": f"m{i}.png"} if task == "segmentation" else {"label": i % 2}
        cases.append(Case.model_validate({"id": f"c{i}", "images": (f"i{i}.png",), **target}))
    fields = {"source": str(root), "root": str(root), "task": task, "ndim": 2, "channels": 1, **kwargs}
    return Manifest.model_validate({"classes": ("background", "a", "b"), "cases": tuple(cases), **fields})


CONFIG = PreprocessConfig(pad_multiple=4)


def is_mapped(array: Any) -> bool:
    """Whether it is a view of a file, rather than read from one."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_the_store_holds_what_the_preprocessor_made(tmp_path: Path) -> None:
    manifest = folder_of_pictures(tmp_path)
    told: list[tuple[int, int]] = []
    store = PreparedStore.open_or_build(
        manifest, CONFIG, tmp_path / "cache", progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i, 5) for i in range(1, 6)]
    chain = Preprocessor(CONFIG, ndim=2, channels=1)
    assert len(store) == 5
    for i, case in enumerate(manifest.cases):
        image, mask, valid = read_case(case, tmp_path)
        assert mask is not None
        array, geometry = chain.prepare(image)
        np.testing.assert_array_equal(store.image(i), array)
        np.testing.assert_array_equal(store.mask(i), chain.prepare_mask(mask, geometry, valid))
        assert store.geometry(i) == geometry and store.shape(i) == geometry.prepared
        assert is_mapped(store.image(i)) and not store.image(i).flags.writeable


def test_foreground_lies_on_its_classes(tmp_path: Path) -> None:
    store = PreparedStore.open_or_build(folder_of_pictures(tmp_path), CONFIG, tmp_path / "cache")
    for i in range(len(store)):
        mask, classes = store.mask(i), store.foreground_classes(i)
        assert mask is not None
        np.testing.assert_array_equal(mask[tuple(store.foreground(i).T)], classes)
        assert set(classes) == {1, 2} and (np.diff(classes.astype(int)) >= 0).all()


def test_foreground_is_sampled_by_class() -> None:
    labels = np.zeros((60, 60, 60), np.uint8)
    labels[:30] = 1
    labels[40, 40, 40:43] = 2
    labels[50:] = IGNORE
    voxels, classes = cache._sample_foreground(labels, 0)
    assert np.bincount(classes).tolist() == [0, 1000, 3]
    assert len(np.unique(voxels, axis=0)) == 1003


def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = folder_of_pictures(tmp_path)
    first = PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")
    monkeypatch.setattr(cache, "_write", lambda *_: pytest.fail("built anew"))
    assert PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache").path == first.path


@pytest.mark.parametrize("change", ["config", "file", "classes"])
def test_what_changes_the_arrays_builds_anew(tmp_path: Path, change: str) -> None:
    manifest = folder_of_pictures(tmp_path)
    first = PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")
    config = PreprocessConfig(normalize="none") if change == "config" else CONFIG
    if change == "file":
        Picture.fromarray(np.full((9, 9), 3, np.uint8)).save(tmp_path / "i0.png")
        Picture.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "m0.png")
    if change == "classes":
        manifest = manifest.model_copy(update={"classes": ("background", "a", "b", "c")})
    assert PreparedStore.open_or_build(manifest, config, tmp_path / "cache").path != first.path


def test_a_label_does_not(tmp_path: Path) -> None:
    manifest = folder_of_pictures(tmp_path, task="classification")
    first = PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")
    relabelled = manifest.model_copy(update={"cases": tuple(c.model_copy(update={"label": 1}) for c in manifest.cases)})
    second = PreparedStore.open_or_build(relabelled, CONFIG, tmp_path / "cache")
    assert second.path == first.path and (first.label(0), second.label(0)) == (0, 1)
    assert first.mask(0) is None and not (first.path / "masks.bin").exists()


@pytest.mark.parametrize("name", ["images.bin", "masks.bin", "index.npz", "store.json"])
def test_a_damaged_store_is_built_anew(tmp_path: Path, name: str) -> None:
    manifest = folder_of_pictures(tmp_path)
    store = PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")
    expected = np.array(store.image(3))
    os.truncate(store.path / name, 20)
    again = PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")
    np.testing.assert_array_equal(again.image(3), expected)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    manifest = folder_of_pictures(tmp_path)
    (tmp_path / "i3.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableError, match=r"i3\.png"):
        PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_leftovers_of_killed_builds_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / "cache/.building-old", tmp_path / "cache/.building-young"
    for left in (old, young):
        left.mkdir(parents=True)
        (left / "images.bin").write_bytes(b"half")
    os.utime(old, (0, 0))
    PreparedStore.open_or_build(folder_of_pictures(tmp_path), CONFIG, tmp_path / "cache")
    assert not old.exists() and young.exists()


def test_builders_that_race_all_get_a_whole_store(tmp_path: Path) -> None:
    manifest = folder_of_pictures(tmp_path)
    found: list[PreparedStore] = []

    def build() -> None:
        found.append(PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache"))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for store in found:
        np.testing.assert_array_equal(store.image(2), found[0].image(2))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [found[0].path.name]


def test_it_travels_by_pickle_without_its_arrays(tmp_path: Path) -> None:
    store = PreparedStore.open_or_build(folder_of_pictures(tmp_path), CONFIG, tmp_path / "cache")
    expected = np.array(store.image(1))
    sent = pickle.dumps(store)
    assert len(sent) < 20_000
    np.testing.assert_array_equal(pickle.loads(sent).image(1), expected)


def test_a_label_that_no_class_has(tmp_path: Path) -> None:
    manifest = folder_of_pictures(tmp_path, classes=("background", "a"))
    with pytest.raises(DataError, match="label 2, the data set has 2 classes"):
        PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    manifest = folder_of_pictures(tmp_path)
    (tmp_path / "m2.png").unlink()
    with pytest.raises(UnreadableError, match=r"m2\.png"):
        PreparedStore.open_or_build(manifest, CONFIG, tmp_path / "cache")


def test_phantoms_and_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "tiny.npz", train_images=np.random.default_rng(0).integers(0, 255, (9, 28, 28), np.uint8))
    cases = tuple(Case(id=str(i), images=(f"tiny.npz#train_images/{i}",), label=i % 2) for i in range(9))
    fields = {"source": "x", "root": str(tmp_path), "task": "classification", "ndim": 2, "channels": 1}
    manifest = Manifest.model_validate({**fields, "classes": ("a", "b"), "cases": cases})
    store = PreparedStore.open_or_build(manifest, PreprocessConfig(), tmp_path / "cache")
    assert [store.shape(i) for i in range(9)] == [(28, 28)] * 9
    assert store.image(8).std() == pytest.approx(1, abs=0.02)
