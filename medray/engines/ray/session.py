"""Ray itself: a quiet session of our own on this machine's loopback, or a cluster that is there already."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medray.errors import StudyError

_OBJECT_STORE_BYTES = 200 * 2**20  # payloads are small: images go through the memory-mapped cache, not through Ray
_REACH_SECONDS = 10.0
_STARTS = 4  # tries, of half a minute each at most
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing phones home
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer output prints at every verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "5",
}
# A local session's head lives and dies with the session: waiting a minute for it to come back is a minute lost.
_LOCAL = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}


@dataclass(frozen=True, kw_only=True)
class RaySession:
    """A connected Ray.

    Args:
        cpus: of the whole session or cluster, or of all that it may grow to. Where there are GPUs, those beside them.
        gpus: likewise.
        is_local: this process started it, and ends it.
        most_cpus: of the machine that has the most of those.
    """

    cpus: float
    gpus: float
    is_local: bool
    most_cpus: float = float("inf")


@contextlib.contextmanager
def ray_session(
    *, address: str | None = None, cpus: int | None = None, gpus: int | None = None, threads: int = 1
) -> Iterator[RaySession]:
    """Start Ray on this machine, or connect to a cluster; leave as it was found.

    A session that the process already has is used as it is, and left running.

    Args:
        address: ``host:port`` of a cluster's head, or ``auto``, on a machine of that cluster; None starts a session on
            loopback, closed at the end.
        cpus: of the local session; None: all that this process may use.
        gpus: likewise; None: all that are visible.
        threads: that numeric libraries in a worker may use (one trial's CPUs).

    Raises:
        StudyError: the cluster can't be reached, asks for a token, or runs another version of Ray; or the address is
            Ray Client's.
    """
    if address is not None and "://" in address:
        raise _refuse(address)
    import ray

    if ray.is_initialized():
        yield _describe(is_local=False)
        return
    numeric = dict.fromkeys(_THREAD_VARIABLES, str(max(1, threads)))
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if address is None:
        # Workers inherit the environment of the processes started here: no runtime_env is needed, which costs seconds.
        with _environment(_QUIET | _LOCAL | numeric), _loopback_only():
            _start(
                num_cpus=cpus if cpus is not None else usable_cpus(),
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **common,
            )
    else:
        with _environment(_QUIET):
            _connect(address, common | {"runtime_env": {"env_vars": numeric | {"RAY_CHDIR_TO_TRIAL_DIR": "0"}}})
    try:
        yield _describe(is_local=address is None)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Have all of a local session's processes listen on 127.0.0.1 alone.

    Ray turns the address 127.0.0.1 into the machine's outer one, except where it supports no clusters (macOS, Windows).
    Its switch for that is read from the environment by the processes it starts, but only once, at import, by this one.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def usable_cpus() -> int:
    """CPUs that this process may run on (its affinity, as containers and schedulers set it)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def quiet_environment() -> Iterator[None]:
    """The environment in which Ray's libraries print nothing of their own and leave signals to us."""
    with _environment(_QUIET):
        yield


def _start(**options: Any) -> None:
    """Start Ray on this machine. It gives its own processes 30 s, which a machine that is busy otherwise may not keep.

    Raises:
        StudyError: it did not start within all tries.
    """
    import ray

    for left in reversed(range(_STARTS)):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise StudyError(
                    f"Ray did not start within {_STARTS} tries ({error}). This machine is busy, or short of memory: "
                    f"see what runs on it ('medray doctor'), then try again"
                ) from error


def _connect(address: str, options: Mapping[str, Any]) -> None:
    import ray

    _check_reachable(address)
    try:
        ray.init(address=address, **options)
    except Exception as error:
        # Whether it was the token Ray says on its own log only.
        raise StudyError(
            f"the Ray cluster at {address} answers but could not be joined: {error}\nIt must run the same versions of "
            f"Python and Ray ({ray.__version__}) as this machine. One that asks for a token, as those of 'ray up' do, "
            f"needs RAY_AUTH_MODE=token here and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, the same as on its nodes. A "
            f"machine that is none of the cluster's can't join it at all: hand the command to it with 'medray submit'"
        ) from error


def _refuse(address: str) -> StudyError:
    """Over Ray Client, Tune runs its searcher and scheduler in an actor on the cluster (``Tuner``, ``_remote_tuner``).

    Ours are one object that holds the study's file and speaks to the terminal: it can't be sent there. And a client's
    lost connection would end the study.
    """
    host = address.partition("://")[2].partition("/")[0].rpartition(":")[0] or "HEAD"
    return StudyError(
        f"{address}: a study can't be driven through Ray Client, nor over HTTP: what searches would run on another "
        f"machine than the study's folder, and end with the connection. Hand the whole command to the cluster: "
        f"medray submit --address http://{host}:8265 -- tune ...; or, on one of its machines: --address auto"
    )


def _check_reachable(address: str) -> None:
    """Ray itself would try an address where nothing listens for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or a form that Ray may know
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise StudyError(
            f"no Ray cluster could be joined at {address}: {error}. Give the head's host:port (its GCS port, 6379 "
            f"unless changed) and see that it runs and that no firewall stands between"
        ) from error


def _describe(*, is_local: bool) -> RaySession:
    import ray

    machines = [Counter(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if not is_local:
        machines = max(machines, _at_most(), key=lambda some: (_total(some, "GPU"), _total(some, "CPU")))
    gpus = _total(machines, "GPU")
    # A trial on a GPU takes the cores beside it: those of other machines are of no use to it.
    cores = [machine["CPU"] for machine in machines if machine["GPU"] or not gpus]
    return RaySession(cpus=sum(cores), gpus=gpus, is_local=is_local, most_cpus=max(cores, default=0.0))


def _total(machines: Sequence[Mapping[str, float]], kind: str) -> float:
    return float(sum(machine.get(kind, 0) for machine in machines))


def _at_most() -> list[Counter[str]]:
    """Machines that the cluster may grow to, where it says so.

    A cluster that scales from zero has nothing until something waits for it, and nothing waits for what isn't known to
    come. ``MEDRAY_AUTOSCALING`` names the configuration that ``ray up`` left on the head, as cluster.yaml sets it.

    Raises:
        StudyError: the file is not there, or not such a configuration.
    """
    name = os.environ.get("MEDRAY_AUTOSCALING")
    if not name:
        return []
    try:
        config = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
        machines = [
            Counter({resource: float(amount) for resource, amount in value["resources"].items()})
            for key, value in config["available_node_types"].items()
            if key != config["head_node_type"]
            for _ in range(int(value.get("max_workers", config["max_workers"])))
        ]
        return sorted(machines, key=lambda one: (-one["GPU"], -one["CPU"]))[: int(config["max_workers"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(
            f"MEDRAY_AUTOSCALING={name}: not the configuration of a cluster that 'ray up' started ({error!r}). It is "
            f"~/ray_bootstrap_config.yaml on the head; without the variable, only machines that run already count"
        ) from None


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a while; what the user has set himself wins, thread counts excepted."""
    changed = {key: value for key, value in values.items() if key not in os.environ or key in _THREAD_VARIABLES}
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
