"""The cache folder: bounded, shared, and never pulled from under anyone."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medray.config.schema import PreprocessConfig
from medray.data import cache, shelf
from medray.data.cache import PreparedStore
from medray.data.manifest import Manifest
from medray.errors import ConfigError, DataError
from tests.unit.data.test_cache import CONFIG, folder_of_pictures

MANIFESTS: dict[Path, Manifest] = {}  # the pictures are written once: their times count


def build(root: Path, pad: int = 1) -> PreparedStore:
    manifest = MANIFESTS.get(root) or MANIFESTS.setdefault(root, folder_of_pictures(root))
    return PreparedStore.open_or_build(manifest, PreprocessConfig(pad_multiple=pad), root / "cache")


def age(store: PreparedStore, seconds: float) -> Path:
    """Let go of it, as if it had been used so long ago."""
    path = store.path
    store._held.close()
    os.utime(path / "store.json", (time.time() - seconds,) * 2)
    return path


def test_what_lies_there_is_told(tmp_path: Path) -> None:
    store = build(tmp_path)
    (entry,) = shelf.entries(tmp_path / "cache")
    assert (entry.path, entry.source, entry.in_use) == (store.path, str(tmp_path), True)
    assert entry.size == sum(f.stat().st_size for f in store.path.iterdir() if f.name != "store.json")
    age(store, 50)
    (entry,) = shelf.entries(tmp_path / "cache")
    assert not entry.in_use and time.time() - entry.used == pytest.approx(50, abs=5)


def test_the_one_used_longest_ago_goes_first_and_none_that_is_open(tmp_path: Path) -> None:
    oldest, middle = age(build(tmp_path, 2), 300), age(build(tmp_path), 200)
    opened = build(tmp_path, 4)
    os.utime(opened.path / "store.json", (0, 0))
    size = shelf.entries(tmp_path / "cache")[0].size
    assert [entry.path for entry in shelf.trim(tmp_path / "cache", int(2.5 * size))] == [oldest]
    assert [entry.path for entry in shelf.trim(tmp_path / "cache", 0)] == [middle]
    assert opened.image(0).shape and not oldest.exists() and not middle.exists()


def test_a_build_keeps_the_folder_under_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = age(build(tmp_path, 2), 100)
    monkeypatch.setenv("MEDRAY_CACHE_LIMIT", "1KB")
    second = build(tmp_path)  # larger than the limit by itself, and needed all the same
    assert not first.exists() and second.path.exists()


def test_opening_counts_as_use(tmp_path: Path) -> None:
    age(build(tmp_path), 500)
    build(tmp_path)
    assert time.time() - shelf.entries(tmp_path / "cache")[0].used < 100


@pytest.mark.parametrize(("text", "size"), [("50GB", 50 * 10**9), ("1.5 mib", 3 * 2**19), ("1000", 1000), ("0", 0)])
def test_a_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("MEDRAY_CACHE_LIMIT", text)
    assert shelf.limit(tmp_path) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "nan", "inf", "1e99TB", "GB"])
def test_another_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MEDRAY_CACHE_LIMIT", text)
    with pytest.raises(ConfigError, match="MEDRAY_CACHE_LIMIT"):
        shelf.limit(tmp_path)


def test_without_a_limit_half_of_the_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDRAY_CACHE_LIMIT", raising=False)
    statistics = os.statvfs(tmp_path)
    assert shelf.limit(tmp_path) == pytest.approx(statistics.f_bavail * statistics.f_frsize / 2, rel=0.2)


def test_one_builds_while_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, written = folder_of_pictures(tmp_path), []
    write = cache._write

    def slowly(*arguments: object) -> None:
        written.append(1)
        time.sleep(0.2)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_write", slowly)
    threads = [
        threading.Thread(target=PreparedStore.open_or_build, args=(manifest, CONFIG, tmp_path / "cache"))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


def _hold_the_lock(directory: Path, held: multiprocessing.synchronize.Event) -> None:
    with shelf.builder(directory, "x"):
        held.set()
        time.sleep(60)


def test_a_builder_that_is_killed_lets_the_next_one_in(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold_the_lock, args=(tmp_path, held))
    process.start()
    assert held.wait(20)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    with shelf.builder(tmp_path, "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def _open_and_sum(manifest: Manifest, config: PreprocessConfig, directory: Path, found: Any) -> None:
    store = PreparedStore.open_or_build(manifest, config, directory)
    found.put(sum(float(store.image(i).sum()) for i in range(len(store))))


def test_builders_in_processes_go_on_where_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    manifest, directory = folder_of_pictures(tmp_path), tmp_path / "cache"
    begun, found = context.Value("i", 0), context.Queue()
    write = cache._write

    def first_gets_stuck(manifest: Any, preprocessor: Any, folder: Path, *others: Any) -> None:
        with begun.get_lock():
            begun.value += 1
            number = begun.value
        if number == 1:
            (folder / "images.bin").write_bytes(b"half of")
            time.sleep(60)
        write(manifest, preprocessor, folder, *others)

    monkeypatch.setattr(cache, "_write", first_gets_stuck)
    processes = [
        context.Process(target=_open_and_sum, args=(manifest, CONFIG, directory, found), daemon=True) for _ in range(4)
    ]
    processes[0].start()
    while begun.value == 0:
        time.sleep(0.01)
    for process in processes[1:]:
        process.start()
    os.kill(processes[0].pid or 0, signal.SIGKILL)
    sums = [found.get(timeout=60) for _ in processes[1:]]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0, 0]
    assert len(set(sums)) == 1 and begun.value == 2
    assert len(list(directory.iterdir())) == 2, "the store, and what the killed one left, for a day"


def test_processes_that_crowd_each_other_out_all_get_their_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one builds another store, and the folder has no room for two."""
    monkeypatch.setenv("MEDRAY_CACHE_LIMIT", "0")
    context = multiprocessing.get_context("fork")
    manifest = folder_of_pictures(tmp_path)
    found = context.Queue()
    processes = [
        context.Process(target=_open_again_and_again, args=(manifest, pad, tmp_path / "cache", found), daemon=True)
        for pad in (1, 2, 4, 2)
    ]
    for process in processes:
        process.start()
    told = [found.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert told == ["ok"] * 4


def _open_again_and_again(manifest: Manifest, pad: int, directory: Path, found: Any) -> None:
    config = PreprocessConfig(pad_multiple=pad)
    try:
        for _ in range(12):
            store = PreparedStore.open_or_build(manifest, config, directory)
            assert all(np.isfinite(store.image(i)).all() for i in range(len(store)))
            store._held.close()
    except BaseException as error:
        found.put(repr(error))
    else:
        found.put("ok")


def test_eviction_while_another_process_reads(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    first, other = age(build(tmp_path), 200), age(build(tmp_path, 2), 100)
    pipe, there = context.Pipe()
    process = context.Process(target=_read_when_told, args=(MANIFESTS[tmp_path], tmp_path / "cache", there))
    process.start()
    assert pipe.poll(60) and pipe.recv() == first.name
    assert [entry.path for entry in shelf.trim(tmp_path / "cache", 0)] == [other]
    shutil.rmtree(first)  # as a person would
    pipe.send("read")
    assert pipe.poll(60)
    expected = build(tmp_path)
    np.testing.assert_array_equal(pipe.recv(), expected.image(3))
    process.join()
    assert process.exitcode == 0
    age(expected, 0)
    assert [entry.path for entry in shelf.trim(tmp_path / "cache", 0)] == [first]


def _read_when_told(manifest: Manifest, directory: Path, pipe: Any) -> None:
    store = PreparedStore.open_or_build(manifest, PreprocessConfig(pad_multiple=1), directory)
    float(store.image(0).sum())  # maps the file: from now on it can't be taken away
    pipe.send(store.path.name)
    pipe.recv()
    pipe.send(np.array(store.image(3)))


def test_a_full_disk_makes_room_once_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = age(build(tmp_path, 2), 100)
    write, failures = cache._write, []

    def full(*arguments: object) -> None:
        if not failures:
            failures.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_write", full)
    store = build(tmp_path)
    assert not first.exists() and np.isfinite(store.image(0)).all()
    failures.clear()
    with pytest.raises(DataError, match="No space left"):
        build(tmp_path, 4)  # the one that is open can't make room


def test_a_store_removed_between_two_lines_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = age(build(tmp_path), 10), cache._is_whole

    def vanishing(*arguments: object) -> bool:
        found = whole(*arguments)  # type: ignore[arg-type]
        if found:
            monkeypatch.setattr(cache, "_is_whole", whole)
            shelf.trim(tmp_path / "cache", 0)
        return found

    monkeypatch.setattr(cache, "_is_whole", vanishing)
    assert build(tmp_path).path == path


def test_a_store_is_held_from_its_building_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its last line and its first reader another process may trim the folder, again and again."""
    building = cache._build

    def crowded(*arguments: Any) -> Any:
        held = building(*arguments)
        assert shelf.trim(tmp_path / "cache", 0) == []
        return held

    monkeypatch.setattr(cache, "_build", crowded)
    assert build(tmp_path).image(0).shape
