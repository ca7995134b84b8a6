"""A group on two machines of one core each, of which one is lost and another one comes: by Ray's own test cluster.

    python -m tests.integration.ray.elastic_process FOLDER

In a process of its own: the cluster is not the one that the other tests are connected to. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from medray import logs
from medray.engines.ray import train
from medray.engines.ray.session import ray_session
from medray.train.progress import Progress
from medray.workflows.recipe import Recipe
from medray.workflows.training import train_model

EPOCHS = 400
MACHINE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
# So that a lost machine is noticed, and a new one used, in seconds.
QUICK = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",
}


def start() -> Cluster:
    """Ray gives a raylet 30 s, which a busy machine may not keep."""
    for _ in range(3):
        try:
            return Cluster(initialize_head=True, head_node_args={**MACHINE, "include_dashboard": False})
        except Exception as error:
            print(f"again: {error}", file=sys.stderr, flush=True)
    raise SystemExit("Ray does not start")


def main(folder: Path) -> None:
    os.environ.update(QUICK)
    train._RESIZE_SECONDS = 3.0
    setup = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
    recipe = Recipe(directory=setup["directory"], explicit=setup["explicit"], cache=setup["cache"])
    cluster = start()
    machine: Any = cluster.add_node(**MACHINE)
    epochs: list[list[int]] = []
    changed = 0  # 1: a machine is lost, 2: another one has come

    def size() -> int:
        text = (folder / logs.FILE).read_text(encoding="utf-8") if (folder / logs.FILE).exists() else ""
        said = [line["event"] for line in map(json.loads, text.splitlines()) if "processes train" in line["event"]]
        return int(said[-1].split()[0]) if said else 0

    def watch(progress: Progress) -> bool:
        nonlocal changed
        time.sleep((0.05, 0.3, 1.0)[changed])  # an epoch is short, and the epochs must last until it has grown
        epochs.append([progress.epoch, size()])
        if changed == 0 and progress.epoch == 4:
            cluster.remove_node(machine, allow_graceful=False)
            changed = 1
        elif changed == 1 and epochs[-1][1] == 1 and progress.epoch >= 8:
            cluster.add_node(**MACHINE)
            changed = 2
        return changed == 2 and [number for _, number in epochs[-3:]] == [2, 2, 2]

    try:
        with logs.recording(folder), ray_session(address=cluster.address):
            experiment = recipe.experiment({"train.workers": 2, "train.min_workers": 1})
            trained = train_model(recipe, experiment, folder / "run", on_validation=watch, cpus=2)
    finally:
        cluster.shutdown()
    print(json.dumps({"epochs": epochs, "stopped": trained.fit.stopped, "history": trained.fit.history}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
