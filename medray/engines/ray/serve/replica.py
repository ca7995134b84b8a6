"""What Ray Serve runs: a replica with the whole service in it, and the application around it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medray import logs
from medray.config.serving import ServeConfig, load_serving
from medray.engines.ray.serve import scaling
from medray.engines.ray.serve.fleet import ACCEPTED
from medray.engines.ray.session import usable_cpus

POLL = 0.5
"""Seconds between looks at the files of configuration, keys and bundles."""
_ONGOING = 1000  # Serve's own limit, out of the way: admission is the service's, so that health is answered under load


class Replica:
    """One process that answers.

    Args:
        content: of the configuration at the server's start, JSON.
        path: of its file, to be followed; None: there is none.
        threads: of each engine.
        where: the log to join.
        loopback: nothing of it may be reached from other machines.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        content: dict[str, Any],
        path: str | None,
        threads: int,
        where: logs.Destination | None,
        loopback: bool,
    ) -> None:
        _hush()
        if loopback:
            _keep_to_loopback()
        logs.join(where)
        loop = asyncio.get_running_loop()
        self._over = threading.Event()
        self.service = await asyncio.to_thread(self._make, content, path, threads, loop)
        self._start_to_follow()

    def _start_to_follow(self) -> None:
        self._followers = [
            threading.Thread(target=self._follow, args=(look,), name=f"follow-{what}", daemon=True)
            for what, look in (("configuration", self.service.refresh), ("keys", self.service.refresh_keys))
        ]
        for thread in self._followers:
            thread.start()

    def _make(self, content: dict[str, Any], path: str | None, threads: int, loop: asyncio.AbstractEventLoop) -> Any:
        from medray.engines.ray.serve.batching import ServeBatcher
        from medray.engines.ray.serve.meters import Meters
        from medray.engines.ray.serve.service import Service
        from medray.predict.sliding import load_libraries

        config = ServeConfig.model_validate(content)
        meters = Meters()

        def make_batcher(model: str, version: str, engine: Any) -> ServeBatcher:
            def told(requests: int, samples: int, seconds: float) -> None:
                meters.batch_requests.labels(model, version).observe(requests)
                meters.batch_samples.labels(model, version).observe(samples)
                meters.engine_seconds.labels(model, version).observe(seconds)

            return ServeBatcher(engine, told, config=config.batching, loop=loop)

        service = Service(
            config,
            path=None if path is None else Path(path),
            threads=threads,
            make_batcher=make_batcher,
            meters=meters,
        )
        load_libraries()  # not during the first request
        return service

    def __serve_build_asgi_app__(self) -> Any:
        from medray.engines.ray.serve.app import create_app

        return create_app(lambda: self.service)

    def _follow(self, look: Callable[[], None]) -> None:
        while not self._over.wait(POLL):
            try:
                look()
            except Exception as error:  # a full disk, say; the next look may do better
                logs.event("follow-failed", level="error", error=type(error).__name__)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For Serve: load that it doesn't see, since a job's request is answered as it begins."""
        return {scaling.JOBS: float(self.service.jobs_inside)}

    def check_health(self) -> None:
        """For Serve: the files must still be looked at, and answers accounted for; else another takes its place."""
        if not all(thread.is_alive() for thread in self._followers):
            raise RuntimeError("a thread that follows the files of configuration and keys is gone")
        if not self.service.audit.is_alive:
            raise RuntimeError("the thread of the audit trail is gone")

    async def __del__(self) -> None:  # Serve awaits it
        if hasattr(self, "_over"):
            self._over.set()
        if hasattr(self, "service"):
            await asyncio.to_thread(self.service.close)  # what is under way there needs the event loop


def _hush() -> None:
    """Have the libraries that see what clients send log nothing: their warnings quote bytes, tags and values."""
    for name in ("python_multipart", "pydicom", "highdicom", "nibabel", "PIL", "tifffile", "SimpleITK"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")


def _keep_to_loopback() -> None:
    """Have this replica's own gRPC server, through which Serve's deployments call each other, listen on 127.0.0.1.

    As Ray 2.60 comes it listens on all interfaces whatever the host is, asks nobody for a key, and unpickles what it is
    sent. It is started once this constructor has returned.
    """
    from ray.serve._private import replica

    add = replica.add_port_to_grpc_server  # an AttributeError in another Ray is better than an open port
    replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]:", "127.0.0.1:"))


def application(
    config: ServeConfig,
    path: Path | None,
    environment: dict[str, str],
    cpus: int | None = None,
    *,
    loopback: bool = False,
) -> Any:
    """The application for ``serve.run``.

    Args:
        config: of the server.
        path: of its file, to be followed.
        environment: of the replicas.
        cpus: of the machine; None: all that this process may use.
        loopback: nothing but the server's own port may be reached from other machines.
    """
    from ray import serve

    replicas = config.replicas
    have = cpus or usable_cpus()
    threads = replicas.cpus or max(1, have // replicas.most)
    number: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        number = {
            "autoscaling_config": {
                "policy": {"policy_function": scaling.POLICY},
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.load,
                "upscale_delay_s": replicas.up_seconds,
                "downscale_delay_s": replicas.down_seconds,
                "look_back_period_s": max(1.0, min(10.0, replicas.up_seconds)),
                "metrics_interval_s": 0.5,
            }
        }
    numeric = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    variables = dict.fromkeys(numeric, str(threads)) | environment
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="Replica",
        max_ongoing_requests=_ONGOING,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=config.limits.answer_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        # A replica more than there are cores for shares them: it must not wait for ever to be placed.
        ray_actor_options={"num_cpus": min(threads, have / replicas.most), "runtime_env": {"env_vars": variables}},
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
        **number,
    )
    return deployment.bind(
        config.model_dump(mode="json"),
        None if path is None else str(path.absolute()),
        threads,
        logs.destination(),
        loopback,
    )


def build(arguments: dict[str, str]) -> Any:
    """For Ray Serve's own configuration files: ``import_path: medray.engines.ray.serve.replica:build``.

    Args:
        arguments: ``config``, a file as for ``medray serve``, on storage that every machine sees.

    Raises:
        ConfigError: a file that the schema refuses.
    """
    from medray.errors import ConfigError

    if set(arguments) != {"config"}:
        raise ConfigError(f"args of the application: {sorted(arguments)}; there is one, config: the server's file")
    path = Path(arguments["config"])
    config = load_serving(path)
    if config.security.keys is None:
        raise ConfigError(
            f"{path}: on a cluster other machines reach the server, and security.keys is not set, so that anyone could "
            "ask. Make keys with 'medray keys add NAME --file keys.json', and set security.keys: keys.json"
        )
    if config.grpc_port is not None:
        from medray.engines.ray.serve.server import NOT_THERE

        raise ConfigError(f"{path}: {NOT_THERE}")
    with contextlib.suppress(OSError):  # of an earlier server
        (Path(config.state) / ACCEPTED).unlink(missing_ok=True)
    return application(config, path, {}, cpus=(config.replicas.cpus or usable_cpus()) * config.replicas.most)
