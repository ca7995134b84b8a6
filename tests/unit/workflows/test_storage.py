"""A run's folder in a store: whole at every instant, nobody else's, and nothing that leads out of the folder."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from medray.errors import ConfigError, StorageError
from medray.workflows.mirror import Mirror
from medray.workflows.sitting import sitting
from medray.workflows.storage import MARK, RunStore, TakenOverError, bring, parse_index, place_of, write_mark

URL = "s3://bucket/runs/seg"


class Disk:
    """pyarrow's file system of this machine, whose ``breaks``-th change fails, as every one after it does."""

    def __init__(self, breaks: int | None = None) -> None:
        self._disk, self.left = LocalFileSystem(), breaks
        self.opens: Callable[[str], object] = lambda _: None

    def open_output_stream(self, path: str) -> Any:
        self._change()
        self.opens(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return self._disk.open_output_stream(path)

    def delete_file(self, path: str) -> None:
        self._change()
        self._disk.delete_file(path)

    def _change(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise OSError("the network is unreachable")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a study's file that is open elsewhere, its last row in the write-ahead log only."""
    folder = tmp_path / "seg"
    (folder / "trials" / "0000").mkdir(parents=True)
    (folder / "trials" / "0000" / "checkpoint.pt").write_bytes(b"epoch 1")
    (folder / "study.yaml").write_text("a study", encoding="utf-8")
    write_mark(folder, URL)
    return folder


def store(tmp_path: Path, breaks: int | None = None) -> RunStore:
    return RunStore(Disk(breaks), str(tmp_path / "bucket" / "seg"), URL)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_comes_back_as_it_was_without_a_processes_scratch(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    for name in (".ray/session", ".logs/worker.jsonl", "clock.json.part", ".study.lock", "study.db-wal"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"of this process alone")
    (run / "elsewhere").symlink_to("/etc/passwd")
    store(tmp_path).claim(run)
    store(tmp_path).fetch(tmp_path / "again")
    found = contents(tmp_path / "again")
    assert json.loads(found.pop(MARK))["url"] == URL
    del before[MARK]
    assert found == before


def test_a_copy_is_nobodys(run: Path, tmp_path: Path) -> None:
    """The process that the state file names works on the first folder, if it lives."""
    with sitting(run, "study"):
        store(tmp_path).claim(run)
    store(tmp_path).fetch(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "state.json").read_text(encoding="utf-8"))["state"] == "stopped"
    with sitting(tmp_path / "again", "study"):
        pass


def test_the_studys_file_is_taken_as_one_moment_of_it(run: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(run / "study.db")) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE trials (number)")
        writer.execute("INSERT INTO trials VALUES (0)")
        writer.commit()  # in study.db-wal, which is not sent
        writer.execute("INSERT INTO trials VALUES (1)")
        store(tmp_path).claim(run)
    store(tmp_path).fetch(tmp_path / "again")
    with closing(sqlite3.connect(tmp_path / "again" / "study.db")) as reader:
        assert reader.execute("SELECT number FROM trials").fetchall() == [(0,)]


def test_a_store_is_whole_after_a_kill_at_any_change(run: Path, tmp_path: Path) -> None:
    """Each change of the store in turn is the last one: what is fetched then is the old moment, or the new."""
    (run / "log.jsonl").write_text("one line\n", encoding="utf-8")
    first = store(tmp_path).claim(run)
    old = contents(run)
    (run / "trials" / "0000" / "checkpoint.pt").write_bytes(b"epoch 2")
    (run / "trials" / "0000" / "result.json").write_bytes(b"{}")
    (run / "log.jsonl").unlink()
    new = contents(run)
    writer = json.loads(old[MARK])["writer"]
    shutil.copytree(tmp_path / "bucket", tmp_path / "before")
    seen = []
    for breaks in range(6):
        shutil.rmtree(tmp_path / "bucket")
        shutil.copytree(tmp_path / "before", tmp_path / "bucket")
        try:
            store(tmp_path, breaks).publish(run, known=first, writer=writer)
        except StorageError as error:
            assert "network is unreachable" in str(error)
        store(tmp_path).fetch(tmp_path / f"again-{breaks}")
        found = contents(tmp_path / f"again-{breaks}")
        seen.append([{**found, MARK: b""} == {**state, MARK: b""} for state in (old, new)])
    assert seen == [[True, False]] * 3 + [[False, True]] * 3  # two objects, the index; what it no longer names
    assert len(list((tmp_path / "bucket" / "seg" / "objects").iterdir())) == len(new) - 1


def test_what_a_killed_process_had_sent_for_nothing_is_removed(run: Path, tmp_path: Path) -> None:
    store(tmp_path).claim(run)
    orphan = tmp_path / "bucket" / "seg" / "objects" / ("0" * 64)
    orphan.write_bytes(b"half")
    (orphan.parent / "not-ours.txt").write_bytes(b"somebody's")
    store(tmp_path).claim(run)
    assert not orphan.exists() and (orphan.parent / "not-ours.txt").exists()


def test_one_folder_writes_a_run(run: Path, tmp_path: Path) -> None:
    """The run goes on elsewhere: the first folder may not write any more, nor take it back as it stands."""
    first = store(tmp_path)
    known = first.claim(run)
    other = tmp_path / "elsewhere" / "seg"
    store(tmp_path).fetch(other)
    store(tmp_path).claim(other)
    with pytest.raises(TakenOverError, match="another process has taken this run over"):
        first.publish(run, known=known, writer=json.loads((run / MARK).read_text())["writer"])
    with pytest.raises(StorageError, match="may be further than it"):
        store(tmp_path).claim(run)
    store(tmp_path).claim(other)


def test_a_folder_that_is_gone_takes_nothing_from_the_store(run: Path, tmp_path: Path) -> None:
    known = store(tmp_path).claim(run)
    writer = json.loads((run / MARK).read_text())["writer"]
    shutil.rmtree(run)
    with pytest.raises(StorageError, match="is gone"):
        store(tmp_path).publish(run, known=known, writer=writer)
    store(tmp_path).fetch(run)
    assert (run / "study.yaml").is_file()


def index(name: str = "study.yaml", size: Any = 7, sha256: Any = "0" * 64, version: Any = 1) -> bytes:
    files = {name: {"size": size, "sha256": sha256}}
    return json.dumps({"version": version, "writer": "w", "files": files}).encode()


@pytest.mark.parametrize(
    "name",
    ["../.bashrc", "trials/../../x", "/etc/passwd", "", ".", "a//b", "a/./b", "a\\..\\b", "C:x", "a\x00b", "a\nb",
     "x" * 2000, "a/", MARK],
)  # fmt: skip
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(StorageError, match="no path below a run's folder"):
        parse_index(index(name), URL)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b'{"version": 1}', b"\xff\xfe", b"[" * 100_000, index(size=-1), index(size="x"),
     index(sha256="../x"), index(version=2), b'{"version": 1, "writer": "w", "files": {"a": 3}}'],
)  # fmt: skip
def test_a_damaged_index_is_refused(text: bytes) -> None:
    with pytest.raises(StorageError):
        parse_index(text, URL)


@pytest.mark.parametrize("damage", ["altered", "longer", "shorter", "gone"])
def test_damaged_contents_are_refused_and_nothing_is_left(run: Path, tmp_path: Path, damage: str) -> None:
    entries = store(tmp_path).claim(run)
    path = tmp_path / "bucket" / "seg" / "objects" / entries["study.yaml"].sha256
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"altered": b"A" + data[1:], "longer": data + b"x", "shorter": data[:-1]}[damage])
    with pytest.raises(StorageError, match=r"study\.yaml"):
        store(tmp_path).fetch(tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".again*"))


def test_a_file_that_changes_while_it_is_sent_waits_for_the_next_time(run: Path, tmp_path: Path) -> None:
    """One that is written anew in place: its bytes are no longer those that the index would name."""
    report = run / "report.html"
    report.write_text("old", encoding="utf-8")
    known = store(tmp_path).claim(run)
    report.write_text("new", encoding="utf-8")
    disk = Disk()
    disk.opens = lambda path: report.write_text("NEW", encoding="utf-8") if "objects" in path else None
    own = json.loads((run / MARK).read_text())["writer"]
    entries = RunStore(disk, str(tmp_path / "bucket" / "seg"), URL).publish(run, known=known, writer=own)
    store(tmp_path).fetch(tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_text(encoding="utf-8") == "old"
    store(tmp_path).publish(run, known=entries, writer=own)
    store(tmp_path).fetch(tmp_path / "later")
    assert (tmp_path / "later" / "report.html").read_text(encoding="utf-8") == "NEW"


def test_an_outage_is_noted_once_and_made_good(run: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    disk = Disk()
    mirror = Mirror(run, RunStore(disk, str(tmp_path / "bucket" / "seg"), URL), notes.append)
    mirror.start()
    mirror.stop()  # the test says when
    disk.left = 0
    for epoch in (2, 3):
        (run / "trials" / "0000" / "checkpoint.pt").write_text(f"epoch {epoch}", encoding="utf-8")
        mirror.now()
    assert len(notes) == 1 and "the network is unreachable" in notes[0]
    disk.left = None
    mirror.now()
    store(tmp_path).fetch(tmp_path / "again")
    assert (tmp_path / "again" / "trials" / "0000" / "checkpoint.pt").read_text(encoding="utf-8") == "epoch 3"


def test_a_store_that_is_behind_at_the_end_is_an_error(run: Path, tmp_path: Path) -> None:
    disk = Disk()
    mirror = Mirror(run, RunStore(disk, str(tmp_path / "bucket" / "seg"), URL), lambda _: None)
    mirror.start()
    disk.left = 0
    (run / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StorageError, match=r"is whole, but s3://bucket/runs/seg could not be written"):
        mirror.close()


@pytest.mark.parametrize(
    "url",
    ["gs://bucket/x", "http://host/x", "s3://", "s3://B_ad/x", "s3://key:secret@bucket/x", "s3://bucket/../x",
     "s3://bucket/x?a=b"],
)  # fmt: skip
def test_addresses_that_name_no_store_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX"):
        RunStore.at(url)


def test_where_a_run_is_kept(run: Path, tmp_path: Path) -> None:
    assert place_of(run, None) == URL, "it remembers"
    assert place_of(tmp_path / "new", None) is None
    assert place_of(tmp_path / "new", "s3://bucket/runs/") == "s3://bucket/runs/new"


def test_a_run_is_not_brought_over_another(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        bring("s3://bucket/runs/seg", tmp_path)
