"""Predictions that nobody waits for: states, answers, who may ask, and what becomes of a process that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from medray.engines.ray.serve.jobs import Jobs
from medray.engines.ray.serve.journal import Kept
from medray.engines.ray.serve.keys import add_key
from medray.engines.ray.serve.refusal import RefusedError
from tests.unit.engines.ray.serve.samples import nifti_bytes, nii, png

ANSWER = Kept(status=200, headers={"Content-Type": "application/json"}, body=b"{}\n\x00tail")


def status_of(call: Any) -> int:
    with pytest.raises(RefusedError) as refused:
        call()
    return refused.value.status


def test_a_job_runs_tells_and_ends_for_its_own_key_alone(tmp_path: Path) -> None:
    here, there = Jobs(tmp_path, 60), Jobs(tmp_path, 60)  # two replicas
    token, running = here.begin("anna", "hash", None)
    assert running is not None
    running.tell(0.25)
    found = there.state("anna", token)
    assert (found["state"], found["progress"], found["error"]) == ("running", 0.25, None)
    assert status_of(lambda: there.answer("anna", token)) == 409
    assert status_of(lambda: there.state("bert", token)) == 404
    running.done(ANSWER)
    assert there.state("anna", token)["state"] == "done" and there.state("anna", token)["progress"] == 1.0
    assert there.answer("anna", token) == ANSWER
    assert status_of(lambda: there.forget("bert", token)) == 404
    there.forget("anna", token)
    assert status_of(lambda: here.answer("anna", token)) == 404
    for hostile in ("../state", "x" * 32, "", "0" * 31 + "/"):
        assert status_of(lambda hostile=hostile: here.state("anna", hostile)) == 404


def test_a_refused_image_is_refused_again_when_its_answer_is_asked_for(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 60)
    token, running = jobs.begin("anna", "hash", None)
    assert running is not None
    running.failed(RefusedError(422, "unfit-image", "two channels, and the model takes one"))
    found = jobs.state("anna", token)
    assert found["state"] == "failed" and found["error"]["reason"] == "unfit-image"
    with pytest.raises(RefusedError, match="two channels") as refused:
        jobs.answer("anna", token)
    assert refused.value.status == 422


def test_an_idempotency_key_finds_the_job_and_no_other_request(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 60)
    token, running = jobs.begin("anna", "hash", "again")
    assert running is not None
    assert jobs.begin("anna", "hash", "again") == (token, None)  # it runs
    running.done(ANSWER)
    assert jobs.begin("anna", "hash", "again") == (token, None)  # it is done
    assert status_of(lambda: jobs.begin("anna", "another", "again")) == 422
    assert jobs.begin("bert", "hash", "again")[0] != token
    failed, running = jobs.begin("anna", "hash", "third")
    assert running is not None
    running.failed(RefusedError(503, "no-audit", "try again"))
    token, again = jobs.begin("anna", "hash", "third")
    assert token == failed and again is not None  # what failed is computed anew
    again.done(ANSWER)


def test_a_job_whose_process_was_killed_is_lost_and_can_be_begun_again(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from medray.engines.ray.serve.jobs import Jobs\n"
        "token, running = Jobs(Path(sys.argv[1]), 60).begin('anna', 'hash', 'k')\n"
        "print(token, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    jobs = Jobs(tmp_path, 60)
    assert jobs.state("anna", token)["state"] == "running"
    process.kill()
    process.wait()
    found = jobs.state("anna", token)
    assert found["state"] == "lost" and "again" in found["error"]["message"]
    assert status_of(lambda: jobs.answer("anna", token)) == 503
    same, running = jobs.begin("anna", "hash", "k")
    assert same == token and running is not None and jobs.state("anna", token)["state"] == "running"
    running.drop()


def test_a_job_that_is_removed_while_it_runs_does_not_come_back(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 60)
    token, running = jobs.begin("anna", "hash", "k")
    assert running is not None
    jobs.forget("anna", token)
    assert status_of(lambda: jobs.begin("anna", "hash", "k")) == 409  # it is not lost, and not another's either
    running.tell(0.5)
    running.done(ANSWER)
    assert status_of(lambda: jobs.state("anna", token)) == 404
    assert not list(tmp_path.glob(f"{token}.json")) and not list(tmp_path.glob(f"{token}.answer"))
    again, anew = jobs.begin("anna", "hash", "k")
    assert again == token and anew is not None
    anew.done(ANSWER)
    assert jobs.answer("anna", token) == ANSWER


def test_ended_jobs_go_when_their_time_is_over_and_running_ones_stay(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, 60)
    old, running = jobs.begin("anna", "hash", None)
    long, still = jobs.begin("anna", "hash", None)
    assert running is not None and still is not None
    running.done(ANSWER)
    (tmp_path / f".1.{old}.json").write_text("{", encoding="utf-8")  # a process died while it wrote
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert status_of(lambda: jobs.state("anna", old)) == 404  # before it is swept, too
    Jobs(tmp_path, 60).sweep()
    assert status_of(lambda: jobs.state("anna", old)) == 404 and not [p for p in tmp_path.iterdir() if old in p.name]
    assert jobs.state("anna", long)["state"] == "running"
    still.drop()


def wait_for(client: Any, place: str, **headers: str) -> dict[str, Any]:
    until = time.monotonic() + 60
    while (found := client.get(place, headers=headers).json())["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def test_a_volume_as_a_job_has_the_answer_of_a_prediction(client: Any) -> None:
    body, accept = nifti_bytes(nii()), {"Accept": "application/nifti"}
    begun = client.post("/v1/jobs?model=seg", content=body, headers=accept)
    assert begun.status_code == 202, begun.text
    place = begun.headers["location"]
    assert place == f"/v1/jobs/{begun.json()['id']}"
    assert wait_for(client, place)["state"] == "done"
    answer = client.get(f"{place}/answer")
    direct = client.post("/v1/predict?model=seg", content=body, headers=accept)
    assert answer.status_code == 200 and answer.content == direct.content
    assert answer.headers["content-type"] == "application/nifti"
    assert client.delete(place).status_code == 204
    assert client.get(place).status_code == 404 and client.get(f"{place}/answer").status_code == 404


def test_progress_counts_the_windows_that_the_network_has_seen(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medray.engines.ray.serve import service as module

    told: list[float] = []
    made = module.replace

    def listen(job: Any, **changes: Any) -> Any:
        if "tell" in changes:
            tell = changes["tell"]
            changes["tell"] = lambda fraction: (told.append(fraction), tell(fraction))
        return made(job, **changes)

    monkeypatch.setattr(module, "replace", listen)
    place = client.post("/v1/jobs?model=seg", content=nifti_bytes(nii(shape=(40, 40, 40)))).headers["location"]
    assert wait_for(client, place)["state"] == "done"
    assert len(told) > 1 and told == sorted(told) and told[-1] == 0.99 and 0 < told[0] < 0.99


def test_a_job_that_the_image_does_not_fit_says_so(client: Any) -> None:
    place = client.post("/v1/jobs?model=seg", content=png()).headers["location"]
    found = wait_for(client, place)
    assert found["state"] == "failed"
    answer = client.get(f"{place}/answer")
    assert answer.status_code == found["error"]["status"] == 422
    assert answer.json()["error"]["message"] == found["error"]["message"]


def test_a_job_beyond_those_that_may_wait_leaves_nothing_behind(make_client: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    anna, bert = (add_key(keys, name, ("predict",)) for name in ("anna", "bert"))
    client = make_client(limits={"waiting": 1}, security={"keys": str(keys)})
    go = threading.Event()
    answer = client.service._answer
    client.service._answer = lambda job: (go.wait(60), answer(job))[1]
    try:
        first = client.post("/v1/jobs", content=png(), headers={"X-API-Key": anna})
        assert first.status_code == 202
        refused = client.post("/v1/jobs", content=png(), headers={"X-API-Key": anna})
        assert refused.status_code == 429 and "retry-after" in refused.headers
        state = Path(client.service.fleet.config.state)
        assert len(list((state / "jobs").glob("*.json"))) == 1
        place = first.headers["location"]
        assert client.get(place, headers={"X-API-Key": bert}).status_code == 404
        assert client.get(place).status_code == 401
    finally:
        go.set()
    assert wait_for(client, place, **{"X-API-Key": anna})["state"] == "done"
    assert json.loads(client.get(f"{place}/answer", headers={"X-API-Key": anna}).content)["classes"]
