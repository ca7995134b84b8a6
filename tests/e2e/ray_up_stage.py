"""What test_ray_up.py runs within namespaces of its own: a laptop, a head and a worker on a network of three.

The cluster is brought up, runs a command, loses a machine in the middle of a study, gets it back, and is ended.

    unshare --net --pid --mount --fork --kill-child --mount-proc python ray_up_stage.py laptop FOLDER

Each machine has its own processes, network, /tmp/ray and home folder (the true one, with writes kept elsewhere), and
an sshd on port 22. /mnt/medray is one folder for all. So the commands of docs/cluster.md run as they stand, `ray stop`
ends what these machines run and nothing else, and nothing of it is left behind. Prints a JSON object a line: what each
command came to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
HOME = Path.home()
BIN = Path(sys.executable).parent
LAPTOP, HEAD, WORKER = "10.77.0.254", "10.77.0.1", "10.77.0.2"
SLACK = float(os.environ.get("MEDRAY_TEST_SLACK", "1"))
"""By which all time limits are stretched, for a machine that is busy otherwise."""
STUDY = """\
defaults: [task: classification, augment: none, _self_]
data: phantom://xray-nodules?cases=40&size=32
device: cpu
model: {name: small_cnn, feature_size: 16}
train: {epochs: 120, validate_every: 4, batch_size: 8}
study: {name: cut, budget: 3h, trials: 4, pruner: none, sampler: random, concurrency: 2, ensemble: false}
space: {optim.lr: {float: [1.0e-4, 1.0e-2], log: true}}
"""
RUN = Path("/mnt/medray/runs/cut")
# A machine that is silent for about 20 s is lost; Ray's own patience is over a minute.
IMPATIENT = "RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=3000 RAY_health_check_failure_threshold=5"


def sh(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=True, capture_output=True, text=True, **options)


def private(folder: Path) -> None:
    """This machine's own /tmp/ray and home folder."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    sh("mount", "-t", "tmpfs", "tmpfs", "/tmp/ray")
    folder.mkdir()
    sh("mount", "-t", "tmpfs", "tmpfs", str(folder))
    for name in ("upper", "work"):
        (folder / name).mkdir()
    layers = f"lowerdir={HOME},upperdir={folder}/upper,workdir={folder}/work"
    sh("mount", "-t", "overlay", "overlay", "-o", layers, str(HOME))
    for name in (".ray/auth_token", "medray-src"):
        subprocess.run(["rm", "-rf", str(HOME / name)], check=True)
    environment = HOME / "medray-env"
    if not environment.exists():
        environment.symlink_to(BIN.parent)  # what pip would install, and takes several GB


def host(folder: Path, address: str) -> None:
    """A machine of the cluster: becomes its sshd."""
    for _ in range(100):
        if subprocess.run(["ip", "link", "show", "eth0"], capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    sh("ip", "link", "set", "eth0", "up")
    sh("ip", "route", "add", "default", "via", LAPTOP)
    private(folder / f"home-{address}")
    Path("/run/sshd").mkdir(exist_ok=True)
    config = folder / "sshd_config"
    os.execv("/usr/sbin/sshd", ["/usr/sbin/sshd", "-D", "-e", "-f", str(config)])


def laptop(folder: Path) -> None:
    """The machine from which the cluster is brought up."""
    sh("mount", "-t", "tmpfs", "tmpfs", "/mnt")
    Path("/mnt/medray").mkdir()
    for name in ("host_key", "key"):
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n",
        encoding="utf-8",
    )
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", "lan", "type", "bridge")
    sh("ip", "addr", "add", f"{LAPTOP}/24", "dev", "lan")
    sh("ip", "link", "set", "lan", "up")
    for number, address in enumerate((HEAD, WORKER)):
        log = (folder / f"sshd-{number}.txt").open("w")
        words = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        words += [sys.executable, __file__, "host", str(folder), address]
        machine = subprocess.Popen(words, stdout=log, stderr=log)
        time.sleep(0.5)
        sh("ip", "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        sh("ip", "link", "set", f"port{number}", "master", "lan", "up")
    private(folder / "home-laptop")
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
    play(folder, cluster_file(folder))


def cluster_file(folder: Path) -> str:
    """cluster.onprem.yaml, filled in, less the installation."""
    config = yaml.safe_load((ROOT / "cluster.onprem.yaml").read_text(encoding="utf-8"))
    config["provider"] |= {"head_ip": HEAD, "worker_ips": [WORKER]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(folder / "key")}
    config["setup_commands"] = [command for command in config["setup_commands"] if "pip install" not in command]
    config["setup_commands"].append(f"echo 'export PYTHONPATH={ROOT}' >> ~/.bashrc")  # likewise
    config["head_start_ray_commands"] = [
        command.replace("ray start", f"{IMPATIENT} ray start") for command in config["head_start_ray_commands"]
    ]
    path = folder / "filled-in.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


def play(folder: Path, file: str) -> None:
    """The commands of docs/cluster.md."""
    say("token", "ray", "get-auth-token", "--generate")
    for _ in range(3):  # Ray gives its processes half a minute to start, which a busy machine may not keep
        up = run("ray", "up", "-y", "--no-config-cache", file, timeout=180)
        if up.returncode == 0:
            break
    tell("up", up)
    if up.returncode == 0:
        with (folder / "tunnel.txt").open("w") as log:
            tunnel = subprocess.Popen(["ray", "dashboard", file], stdout=log, stderr=log, cwd=ROOT)
        status = await_machines(file, 2, seconds=60)
        tell("status", status, machines=_machines(status.stdout))
        say("submit", "medray", "submit", "--follow", "--", "check", "phantom://xray-nodules?cases=4&size=32")
        tell("before", run("pgrep", "-c", "raylet"))
        if os.environ.get("MEDRAY_TEST_CUT_OFF"):
            with contextlib.suppress(subprocess.SubprocessError, OSError, ValueError):  # the rest is said all the same
                cut_off(folder, file)
        tunnel.terminate()
    say("down", "ray", "down", "-y", file, timeout=120)
    for _ in range(round(100 * SLACK)):  # `ray down` stops the head; the others notice
        left = run("pgrep", "-c", "raylet")
        if left.stdout.strip() == "0":
            break
        time.sleep(1)
    tell("after", left)


def cut_off(folder: Path, file: str) -> None:
    """A study over both machines; the worker's cable is pulled while both train, and put back."""
    space = folder / "space.yaml"
    space.write_text(STUDY, encoding="utf-8")
    job = say("study", "medray", "submit", "--", "tune", str(space)).stdout.strip()
    until(lambda: {0, 1} <= {row.get("trial") for row in log() if row["event"] == "trial-progress"}, 120)
    sh("ip", "link", "set", "port1", "down")
    until(lambda: any("is run again" in str(row.get("text")) for row in log()), 120)
    sh("ip", "link", "set", "port1", "up")
    status = await_machines(file, 2, seconds=120)
    tell("back", status, machines=_machines(status.stdout))
    ended = run("medray", "submit", "--logs", job, "--follow", timeout=240)
    report = RUN / "report.html"
    tell(
        "ended",
        ended,
        events=[(row["event"], row.get("trial"), row.get("text")) for row in log() if row["event"] != "trial-progress"],
        report=report.read_text(encoding="utf-8") if report.is_file() else "",
    )


def log() -> list[dict[str, Any]]:
    """What the study has said so far."""
    path = RUN / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def until(happened: Callable[[], bool], seconds: float) -> None:
    """Wait; what has not happened then, the test finds out by what it has come to."""
    deadline = time.monotonic() + SLACK * seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.1)


def await_machines(file: str, count: int, *, seconds: float) -> subprocess.CompletedProcess[str]:
    """The last `ray status`, when there are so many machines, or the time is over."""
    deadline = time.monotonic() + SLACK * seconds
    while True:
        status = run("ray", "exec", "--no-config-cache", file, "ray status", timeout=30)
        if _machines(status.stdout) == count or time.monotonic() > deadline:
            return status
        time.sleep(1)


def _machines(status: str) -> int:
    """Machines in ``ray status``: ' 1 local.cluster.node', or one a line."""
    active = status.partition("Active:")[2].partition("Pending:")[0]
    return sum(int(count) for count in re.findall(r"^\s*(\d+) \S", active, re.MULTILINE))


def run(*words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=SLACK * timeout, cwd=ROOT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return subprocess.CompletedProcess(words, 124, output, "timed out")


def say(name: str, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    done = run(*words, timeout=timeout)
    tell(name, done)
    return done


def tell(name: str, done: subprocess.CompletedProcess[str], **more: Any) -> None:
    said = {"name": name, "code": done.returncode, "out": done.stdout[-6000:], "err": done.stderr[-6000:], **more}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    role, where, *more = sys.argv[1:]
    laptop(Path(where)) if role == "laptop" else host(Path(where), *more)
