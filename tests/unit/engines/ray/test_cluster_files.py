"""cluster.yaml and cluster.onprem.yaml against Ray's own schema, and what medray promises of them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

NAMES = ("cluster.yaml", "cluster.onprem.yaml")


def load(repository: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((repository / name).read_text(encoding="utf-8"))


def prepared(repository: Path, name: str) -> dict[str, Any]:
    """As ``ray up`` fills it in and checks it, before it speaks to a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(repository, name))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_ray_takes_the_file(repository: Path, name: str) -> None:
    config = prepared(repository, name)
    assert config["available_node_types"] and config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", NAMES)
def test_rays_schema_would_notice(repository: Path, name: str) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(repository, name) | {"setup_command": ["a key that is misspelt"]})
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_machine_asks_for_the_token_and_knows_the_shared_folder(repository: Path, name: str) -> None:
    config = prepared(repository, name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        before = start.partition("ray start")[0]
        assert "RAY_AUTH_MODE=token" in before and "MEDRAY_SHARED=/mnt/medray" in before
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("chmod 600 ~/.ray/auth_token" in command for command in commands)
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start and "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@pytest.mark.parametrize("name", NAMES)
def test_medray_is_installed_by_its_constraints_from_what_is_mounted(repository: Path, name: str) -> None:
    config = prepared(repository, name)
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        installs = [command for command in commands if "pip install" in command]
        assert installs and all("-c ~/medray-src/constraints.txt" in command for command in installs)
        assert any(command.endswith(" ~/medray-src") for command in installs)
    sources = {remote: local for remote, local in config["file_mounts"].items() if "medray-src" in remote}
    assert all((repository / local).exists() for local in sources.values())
    # What the build reads has to be among them.
    project = (repository / "pyproject.toml").read_text(encoding="utf-8")
    named = {"pyproject.toml", "constraints.txt", "medray", *re.findall(r'^readme = "(.+)"', project, re.MULTILINE)}
    assert named | {"LICENSE"} == set(sources.values())
    assert all(remote == f"~/medray-src/{local}" for remote, local in sources.items())


@pytest.mark.parametrize("name", NAMES)
def test_its_commands_are_a_shells(repository: Path, name: str) -> None:
    config = prepared(repository, name)
    keys = [key for key in config if key.endswith("_commands")]
    for command in [command for key in keys for command in config[key]]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_set_up_adds_nothing_to_the_login_file(repository: Path, name: str, tmp_path: Path) -> None:
    (command,) = [command for command in load(repository, name)["setup_commands"] if ".bashrc" in command]
    for _ in range(2):
        subprocess.run(["bash", "-c", command], check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    done = subprocess.run(
        ["bash", "-c", 'source ~/.bashrc; echo "$PATH $RAY_AUTH_MODE $MEDRAY_SHARED"'],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout.split() == [f"{tmp_path}/medray-env/bin:/usr/bin:/bin", "token", "/mnt/medray"]
    assert len((tmp_path / ".bashrc").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_no_secret(repository: Path, name: str) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    assert not re.search(r"\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|RAY_AUTH_TOKEN=", text)


def test_gpus_come_from_zero_spot_before_on_demand_and_the_head_is_neither(repository: Path) -> None:
    config = prepared(repository, "cluster.yaml")
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0 and head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    spot = [one for one in types.values() if "InstanceMarketOptions" in one["node_config"]]
    demand = [one for one in types.values() if "InstanceMarketOptions" not in one["node_config"]]
    assert spot and demand
    assert all(one["min_workers"] == 0 and one["resources"]["GPU"] >= 1 for one in types.values())
    assert min(one["priority"] for one in spot) > max(one["priority"] for one in demand)
    # Either type alone can fill the cluster, and a trial that fits the one fits the other.
    assert all(one["max_workers"] == config["max_workers"] for one in types.values())
    assert all(one["resources"] == spot[0]["resources"] for one in demand)


def test_rays_autoscaler_takes_on_demand_where_spot_failed(repository: Path) -> None:
    """The fall-back is Ray's: asked here as its scheduler would be."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    config = AutoscalingConfig(prepared(repository, "cluster.yaml"), skip_content_hash=True)
    trial = ResourceRequestByCount(request=ResourceRequestUtil.make({"CPU": 8, "GPU": 1}), count=3)

    def launched(availability: dict[str, float]) -> dict[str, int]:
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=config.get_node_type_configs(),
                max_num_nodes=config.get_max_num_nodes(),
                resource_requests=[trial],
                cloud_resource_availabilities=availability,
                recoverable_resource_availabilities=availability,
            )
        )
        assert not reply.infeasible_resource_requests
        return {request.instance_type: request.count for request in reply.to_launch}

    assert launched({}) == {"gpu-spot": 3}
    assert launched({"gpu-spot": 0.0}) == {"gpu-on-demand": 3}


def test_onprem_lists_hosts(repository: Path) -> None:
    provider = load(repository, "cluster.onprem.yaml")["provider"]
    assert provider["type"] == "local" and provider["head_ip"] not in provider["worker_ips"]
    config = prepared(repository, "cluster.onprem.yaml")
    assert config["max_workers"] == len(provider["worker_ips"])
    # The newer autoscaler counts the head as a worker here: the last machine of the list would never be started.
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "RAY_enable_autoscaler_v2=0" in start.partition("ray start")[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_and_the_file_agree(repository: Path, name: str) -> None:
    guide = (repository / "docs" / "cluster.md").read_text(encoding="utf-8")
    for command in (f"ray up {name}", f"ray down {name}", f"ray dashboard {name}"):
        assert shlex.join(shlex.split(command)) in guide
