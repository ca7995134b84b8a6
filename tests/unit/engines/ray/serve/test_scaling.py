"""The rule of the autoscaler, as Ray Serve applies it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from medray.config.serving import check_serving
from medray.engines.ray.serve import scaling
from medray.engines.ray.serve.replica import application

MODELS = {"seg": {"versions": {"1": {"bundle": "runs/seg/bundle"}}}}


def deployed(tmp_path: Path, **replicas: Any) -> Any:
    content = {"models": MODELS, "replicas": replicas}
    config = check_serving(content, source="here", folder=tmp_path)
    return application(config, None, {}, cpus=4)._bound_deployment._deployment_config


def context(
    config: Any, replicas: int, *, requests: float = 0.0, jobs: tuple[float, ...] = (), state: Any = None
) -> Any:
    metrics = {scaling.JOBS: {f"replica {number}": count for number, count in enumerate(jobs)}} if jobs else None
    return AutoscalingContext(
        deployment_id=None, deployment_name="Replica", app_name="medray", current_num_replicas=replicas,
        target_num_replicas=replicas, running_replicas=[], total_num_requests=requests, total_queued_requests=0.0,
        aggregated_metrics=metrics, raw_metrics=None, capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8, policy_state=state or {}, last_scale_up_time=None, last_scale_down_time=None,
        current_time=None, config=config,
    )  # fmt: skip


def settled(config: Any, replicas: int, **load: Any) -> int:
    """What Ray makes of it once the load has lasted."""
    policy = _apply_autoscaling_config(config.policy.get_policy())
    _, state = policy(context(config, replicas, **load))
    return int(policy(context(config, replicas, **load, state=state))[0])


@pytest.fixture
def eager(tmp_path: Path) -> Any:
    """The deployment's own autoscaling, without its delays."""
    found = deployed(tmp_path, least=1, most=8, load=4).autoscaling_config
    none = dict.fromkeys(("upscale_delay_s", "downscale_delay_s"), 0.0)
    return found.model_copy(update=none)


@pytest.mark.parametrize(
    ("replicas", "load", "wanted"),
    [
        (1, {"requests": 4.0}, 1),
        (1, {"requests": 4.1}, 2),
        (1, {"requests": 2.0, "jobs": (6.0,)}, 2),
        (2, {"jobs": (9.0, 3.0)}, 3),
        (2, {"jobs": (1.0, 0.0)}, 1),
        (1, {"jobs": (1.0,)}, 1),
        (2, {"jobs": (5.0, 0.0)}, 2),
        (2, {}, 1),
        (0, {}, 0),
    ],
)
def test_requests_and_jobs_are_load(eager: Any, replicas: int, load: Any, wanted: int) -> None:
    assert settled(eager, replicas, **load) == wanted


def test_what_the_file_says_is_what_ray_is_told(tmp_path: Path) -> None:
    fixed = deployed(tmp_path, least=2, most=2)
    assert fixed.autoscaling_config is None and fixed.num_replicas == 2
    found = deployed(tmp_path, least=1, most=3, load=5, down_seconds=7).autoscaling_config
    assert (found.min_replicas, found.max_replicas) == (1, 3)
    assert (found.downscale_delay_s, found.target_ongoing_requests) == (7, 5)
    assert found.policy.get_policy().__name__ == "by_load"


def test_the_controller_imports_no_more_than_the_rule() -> None:
    heavy = "{'torch', 'ray', 'fastapi', 'numpy'}"
    script = f"import sys, medray.engines.ray.serve.scaling; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_replica_tells_the_jobs_that_it_has(make_service: Any) -> None:
    from medray.engines.ray.serve.replica import Replica

    service = make_service()
    replica: Any = SimpleNamespace(service=service)
    assert Replica.record_autoscaling_stats(replica) == {"jobs": 0.0}
    with service._later.admitted(), service._later.admitted():
        assert Replica.record_autoscaling_stats(replica) == {"jobs": 2.0}
