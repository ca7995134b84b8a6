"""`ray up cluster.onprem.yaml`, `medray submit`, a machine lost, `ray down`: on machines that are namespaces here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ray_up_stage import SLACK

STAGE = Path(__file__).with_name("ray_up_stage.py")
APART = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


def lacking() -> str | None:
    for program, package in (("/usr/sbin/sshd", "openssh-server"), ("rsync", "rsync"), ("ip", "iproute2")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian's {package})"
    try:
        done = subprocess.run([*APART, "true"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no namespaces: {error}"
    return None if done.returncode == 0 else f"no namespaces: {done.stderr.strip()}"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each command came to: one cluster for both tests, since bringing it up is most of the time."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [*APART, sys.executable, str(STAGE), "laptop", str(tmp_path_factory.mktemp("stage"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=900 * SLACK)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the namespace's first process dies with it, and with that all
    found: dict[str, dict[str, Any]] = {one["name"]: one for one in map(json.loads, out.splitlines())}
    assert found.get("up", {}).get("code") == 0, (found.get("up"), err)
    return found


@pytest.mark.timeout(1000 * SLACK)
def test_the_documented_commands_bring_a_cluster_up_run_on_it_and_end_it(said: dict[str, dict[str, Any]]) -> None:
    assert said["status"]["machines"] == 2, said["status"]
    assert said["submit"]["code"] == 0 and "4 cases" in said["submit"]["out"], said["submit"]
    assert said["before"]["out"].strip() == "2", "one raylet a machine"
    assert said["down"]["code"] == 0, said["down"]
    assert said["after"]["out"].strip() == "0", "the worker ends when its head is gone"


@pytest.mark.skipif(
    not os.environ.get("MEDRAY_TEST_CUT_OFF"), reason="not seen to pass yet; MEDRAY_TEST_CUT_OFF=1 runs it"
)
@pytest.mark.timeout(1000 * SLACK)
def test_a_study_outlives_a_machine_that_is_cut_off(said: dict[str, dict[str, Any]]) -> None:
    """Its trials are run again on the other; the study ends, says what was lost where, and the machine comes back."""
    ended = said["ended"]
    assert ended["code"] == 0, ended
    lost = [text for event, _, text in ended["events"] if event == "note" and "is run again" in text]
    assert lost and all("was lost on 10.77.0.2" in text for text in lost), ended["events"]
    completed = sorted(trial for event, trial, _ in ended["events"] if event == "trial-completed")
    assert completed == [0, 1, 2, 3], ended["events"]
    assert f"Lost and run again</td><td>{len(lost)}: trial" in ended["report"]
    assert said["back"]["machines"] == 2, said["back"]
