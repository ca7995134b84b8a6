"""What a session makes of an address and of a cluster, without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from medray.engines.ray.session import _at_most, _start, ray_session
from medray.errors import StudyError

CONFIG = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "small": {"resources": {"CPU": 16}, "max_workers": 2},
        "spot": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        "demand": {"resources": {"CPU": 8, "GPU": 1}},
    },
}


@pytest.mark.parametrize("address", ["ray://gpu.example:10001", "http://gpu.example:8265"])
def test_a_study_is_not_driven_through_ray_client(address: str) -> None:
    with (
        pytest.raises(StudyError, match=r"medray submit --address http://gpu\.example:8265 -- tune"),
        ray_session(address=address),
    ):
        pass


def test_a_cluster_counts_with_what_it_may_grow_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDRAY_AUTOSCALING", raising=False)
    assert _at_most() == []
    path = tmp_path / "bootstrap.yaml"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    monkeypatch.setenv("MEDRAY_AUTOSCALING", str(path))
    assert [dict(one) for one in _at_most()] == [{"CPU": 8.0, "GPU": 1.0}] * 3


@pytest.mark.parametrize("content", [None, "{", "[]", '{"max_workers": 1}'])
def test_a_wrong_configuration_is_named(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bootstrap.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    monkeypatch.setenv("MEDRAY_AUTOSCALING", str(path))
    with pytest.raises(StudyError, match="MEDRAY_AUTOSCALING"):
        _at_most()


class SlowRay:
    """Stands in for ray, whose processes are up in time only at the ``ready``-th start."""

    def __init__(self, ready: int, said: str = "The current node timed out during startup.") -> None:
        self.ready, self.said, self.starts = ready, said, 0

    def init(self, **options: object) -> None:
        self.starts += 1
        if self.starts < self.ready:
            raise Exception(self.said)

    def shutdown(self) -> None:
        pass


def test_a_busy_machine_gets_more_tries_to_start_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for ready in (1, 4):
        monkeypatch.setitem(sys.modules, "ray", ray := SlowRay(ready))
        _start(num_cpus=2)
        assert ray.starts == ready
    monkeypatch.setitem(sys.modules, "ray", SlowRay(5))
    with pytest.raises(StudyError, match="did not start within 4 tries"):
        _start(num_cpus=2)
    monkeypatch.setitem(sys.modules, "ray", ray := SlowRay(2, "another error"))
    with pytest.raises(Exception, match="another error"):
        _start(num_cpus=2)
    assert ray.starts == 1
