"""What is counted and written down of requests."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from medray.engines.ray.serve.journal import Answers, Audit, Kept
from medray.engines.ray.serve.rates import Admission, RateLimit
from medray.engines.ray.serve.refusal import RefusedError
from medray.engines.ray.serve.work import Work
from medray.errors import ServingError


def test_a_rate_holds_over_replicas_and_refills(tmp_path: Path) -> None:
    now = 1000.0
    replicas = [RateLimit(tmp_path / "rates", lambda: now) for _ in range(2)]
    for turn in range(6):  # a tenth of a minute's 60
        replicas[turn % 2].take("a" * 12, 60)
    with pytest.raises(RefusedError) as refused:
        replicas[0].take("a" * 12, 60)
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "1"
    replicas[0].take("b" * 12, 60)  # another key's is its own
    now += 1.0
    replicas[1].take("a" * 12, 60)
    with pytest.raises(RefusedError):
        replicas[1].take("a" * 12, 60)


def test_places_are_given_back_also_after_an_error() -> None:
    admission = Admission(1)
    with pytest.raises(KeyError), admission.admitted():
        with pytest.raises(RefusedError), admission.admitted():
            pass
        raise KeyError
    with admission.admitted():
        assert admission.inside == 1
    assert admission.inside == 0


def test_lines_of_many_threads_are_whole_and_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    writers = [Audit(path) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda n=n: [writers[n % 2].write(n=n, k=k) for k in range(20)]) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["n"], row["k"]) for row in rows) == sorted((n, k) for n in range(4) for k in range(20))
    for writer in writers:
        writer.close()


def test_what_can_not_be_accounted_for_is_not_answered(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, audit._descriptor)
    with pytest.raises(RefusedError) as refused:
        audit.write(who="x")
    assert refused.value.status == 503
    os.close(full)
    audit.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ServingError, match="audit trail"):
        Audit(tmp_path / "file" / "audit.jsonl")


def test_a_client_that_goes_away_does_not_end_the_audit_trail(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")

    async def leave() -> None:
        waiter = asyncio.wrap_future(audit.submit(n=1))
        waiter.cancel()
        await asyncio.sleep(0)

    for _ in range(20):
        asyncio.run(leave())
    assert audit.submit(n=2).result(timeout=10) is None
    assert audit.is_alive and len((tmp_path / "audit.jsonl").read_text().splitlines()) == 21
    audit.close()
    audit.close()
    assert not audit.is_alive


def test_the_audit_s_thread_outlives_any_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _: int("x"))
        with pytest.raises(RefusedError) as refused:
            audit.submit(n=1).result(timeout=10)
    assert refused.value.status == 503
    assert audit.submit(n=2).result(timeout=10) is None
    audit.close()


def test_files_of_a_process_that_is_gone_are_removed_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    dead = (
        "import sys, pathlib, os; from medray.engines.ray.serve.work import Work; w = Work(pathlib.Path(sys.argv[1])); "
    )
    dead += "(w.new_folder() / 'scan').write_text('x'); os._exit(9)"
    living = Work(tmp_path)
    (living.new_folder() / "scan").write_text("y")
    subprocess.run([sys.executable, "-c", dead, str(tmp_path)], check=False)
    assert sorted(path.read_text() for path in tmp_path.rglob("scan")) == ["x", "y"]
    assert (tmp_path / "work").stat().st_mode & 0o077 == 0
    other = Work(tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("scan")] == ["y"]
    living.close()
    living.close()
    other.close()
    assert not list(tmp_path.rglob("scan"))


def test_answers_are_kept_for_their_key_and_request_alone(tmp_path: Path) -> None:
    answer = Kept(status=200, headers={"Content-Type": "x/y"}, body=b"\x00answer")
    one, other = (Answers(tmp_path / "answers", 60) for _ in range(2))
    with one.slot("me", "k", "request") as slot:
        assert slot.kept is None
        with pytest.raises(RefusedError) as busy, other.slot("me", "k", "request"):
            pass
        assert busy.value.status == 409
        slot.keep(answer)
    with other.slot("me", "k", "request") as slot:
        assert slot.kept == answer
    with pytest.raises(RefusedError) as reused, other.slot("me", "k", "another"):
        pass
    assert reused.value.status == 422
    with other.slot("you", "k", "another") as slot:  # the same word of another client
        assert slot.kept is None


def test_answers_are_forgotten_in_time_and_a_torn_one_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    answers = Answers(folder, 60)
    with answers.slot("me", "k", "r") as slot:
        slot.keep(Kept(status=200, headers={}, body=b"12345"))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with answers.slot("me", "k", "r") as slot:
        assert slot.kept is None
    path.write_bytes(whole)
    os.utime(path, (1, 1))
    with Answers(folder, 60).slot("me", "k2", "r"):
        assert not path.exists()
