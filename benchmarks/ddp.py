"""What do two processes bring, and what does Ray Train cost beside plain torchrun?

The planned default in 3-D and in 2-D, no augmentation, one global batch, by one process with one thread, one with two,
and two with one each; beside them the same network, loss, precision and batches in a plain DistributedDataParallel loop
that torchrun starts. They take turns. And the start: seconds from the call to the first step of two processes, by
medray and by a bare TorchTrainer in the same driver, the first time and again.

    python -m benchmarks ddp
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Figure, Result, Target

SCENES: dict[str, tuple[str, int]] = {
    "3d": ("phantom://mr-lesions?cases=16&size=40", 4),
    "2d": ("phantom://xray-nodules?cases=256&size=28", 128),
}
"""Data and global batch."""
WAYS = {"1 x 1 thread": (1, 1), "1 x 2 threads": (1, 2), "2 x 1 thread": (2, 1)}
"""Processes and threads of each."""


def run(quick: bool) -> Result:
    """Seconds of a step, by way and by scene; ours over torchrun's; seconds to the first step."""
    rounds, steps = (1, 4) if quick else (4, 20)
    scenes = ["2d"] if quick else list(SCENES)
    ways = ["2 x 1 thread"] if quick else list(WAYS)
    figures: dict[str, Figure] = {}
    plain: dict[str, Figure] = {}
    targets: dict[str, Target] = {}
    with tempfile.TemporaryDirectory() as folder:
        for scene in scenes:
            work = Path(folder) / scene
            _prepare(scene, work, steps)
            times: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for way in ways:
                    times.setdefault(("ours", way), []).append(_ours(work, way))
                times.setdefault(("torchrun", "2 x 1 thread"), []).append(_torchrun(work))
            ours, theirs = np.array(times["ours", "2 x 1 thread"]), np.array(times["torchrun", "2 x 1 thread"])
            for way in ways:
                figures[f"step_{scene}, {way}"] = Figure(value=1e3 * median(times["ours", way]), unit="ms")
            plain[f"step_{scene}, 2 x 1 thread"] = Figure(value=1e3 * median(theirs.tolist()), unit="ms")
            name = f"speed_over_torchrun_{scene}"
            figures[name] = _interval(len(ours), lambda rows, a=ours, b=theirs: float(np.median(b[rows] / a[rows])))
            targets[name] = Target(op=">=", value=0.97)
            for way in ways[:-1]:
                base = np.array(times["ours", way])
                figures[f"speedup_{scene}, over {way}"] = _interval(
                    len(ours), lambda rows, a=ours, b=base: float(np.median(b[rows] / a[rows]))
                )
        starts = _starts(Path(folder), warm=not quick)
    for when in starts["medray"]:
        figures[f"start_{when}"] = Figure(value=starts["medray"][when], unit="s")
        plain[f"start_{when}"] = Figure(value=starts["bare"][when], unit="s")
    figures["start_over_ray"] = Figure(value=min(starts["medray"].values()) / min(starts["bare"].values()))
    targets["start_over_ray"] = Target(op="<=", value=1.0)
    notes = [
        f"Medians of {rounds} turns of {steps} steps, the first five left out. Torchrun's figure for the start is a "
        "bare Ray TorchTrainer's.",
        *(f"{scene}: {source}, global batch {batch}" for scene, (source, batch) in SCENES.items() if scene in scenes),
    ]
    return Result(
        figures=figures,
        targets={} if quick else targets,
        peers={"torchrun DDP, bare TorchTrainer": plain},
        notes=notes,
    )


def _interval(count: int, statistic: Callable[[Any], float]) -> Figure:
    from medray.learn.intervals import bootstrap

    if count < 3:
        return Figure(value=statistic(np.arange(count)))
    return Figure(**bootstrap(np.arange(count), statistic, method="percentile")._asdict())


def _prepare(scene: str, work: Path, steps: int) -> None:
    """Manifest, prepared cases and the batches' tensors, for both sides."""
    import torch

    from medray.workflows.planning import prepare_directory
    from medray.workflows.recipe import Recipe
    from medray.workflows.training import open_store

    source, batch = SCENES[scene]
    work.mkdir()
    prepare_directory(source, work)
    explicit: dict[str, Any] = {
        "device": "cpu",
        "augment": {"strength": 0.0},
        "train": {"batch_size": batch, "ema": 0.0, "foreground": 0.0, "samples_per_case": 1, "sync_batchnorm": False},
    }
    recipe = Recipe(directory=str(work), explicit=explicit, cache=str(work / "cache"), horizon=300.0)
    experiment = recipe.experiment()
    cases = len(recipe.splits(experiment).train)
    epochs = max(1, round(steps / -(-cases // batch)))
    # Validation in the last epoch alone: it is no step.
    explicit["train"] |= {"epochs": epochs, "validate_every": epochs}
    store = open_store(recipe, experiment)
    images = torch.from_numpy(np.stack([np.asarray(store.image(i)) for i in range(min(batch, len(store)))]))
    kind, masks = recipe.manifest.task, None
    if kind == "segmentation":
        masks = torch.from_numpy(np.stack([np.asarray(store.mask(i)) for i in range(len(images))]))
    torch.save({"images": images, "masks": masks}, work / "batch.pt")
    setup = {
        "explicit": explicit,
        "kind": kind,
        "classes": len(recipe.manifest.classes),
        "batch": batch,
        "steps": steps,
        "experiment": experiment.model_dump(mode="json"),
    }
    (work / "setup.json").write_text(json.dumps(setup), encoding="utf-8")


def _call(words: list[str], *, threads: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ours(work: Path, way: str) -> float:
    workers, threads = WAYS[way]
    words = [sys.executable, "-m", "benchmarks.ddp", "ours", str(work), "--workers", str(workers)]
    return float(_call([*words, "--threads", str(threads)], threads=threads)["step"])


def _torchrun(work: Path) -> float:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return float(_call([*words, "-m", "benchmarks.ddp", "plain", str(work)], threads=1)["step"])


def _starts(work: Path, *, warm: bool) -> dict[str, dict[str, float]]:
    words = [sys.executable, "-m", "benchmarks.ddp", "starts", str(work), *(["--warm"] if warm else [])]
    return _call(words, threads=1)


# In processes of their own -------------------------------------------------------------------------------------------


def _train(work: Path, workers: int, threads: int) -> None:
    """One training as a user would start it; the median step of its last ones."""
    import torch

    from medray.engines.ray.session import ray_session
    from medray.workflows.recipe import Recipe
    from medray.workflows.training import train_model

    setup = json.loads((work / "setup.json").read_text(encoding="utf-8"))
    torch.set_num_threads(threads)
    recipe = Recipe(
        directory=str(work),
        explicit={**setup["explicit"], "train": setup["explicit"]["train"] | {"workers": workers}},
        cache=str(work / "cache"),
        horizon=300.0,
    )
    with tempfile.TemporaryDirectory() as folder:
        if workers == 1:
            trained = train_model(recipe, recipe.experiment(), Path(folder))
        else:
            with ray_session(cpus=workers * threads, threads=threads):
                trained = train_model(recipe, recipe.experiment(), Path(folder), cpus=workers * threads)
    print(json.dumps({"step": trained.fit.step_seconds}))


def _plain(work: Path) -> None:
    """The same steps in a loop by hand, one process of torchrun's group."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from medray.config.schema import Experiment
    from medray.learn.optimizers import build_optimizer
    from medray.models.catalogue import build_model
    from medray.tasks.catalogue import build_loss
    from medray.train.precision import autocast, lay_out, memory_format, resolve_precision

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    setup = json.loads((work / "setup.json").read_text(encoding="utf-8"))
    experiment = Experiment.model_validate(setup["experiment"])
    data = torch.load(work / "batch.pt", weights_only=True)
    images = data["images"][rank::size]
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = build_model(
        experiment.model,
        kind=setup["kind"],
        ndim=images.ndim - 2,
        in_channels=images.shape[1],
        num_outputs=setup["classes"],
        patch_size=experiment.train.patch_size or experiment.preprocess.size,
    )
    precision = resolve_precision("auto", device)
    if lay_out(model, device, precision):
        images = images.to(memory_format=memory_format(images.ndim - 2, device, precision))
    if data["masks"] is not None:
        target = data["masks"][rank::size].long()
    else:
        target = torch.arange(len(images)) % setup["classes"]
    criterion = build_loss(experiment.loss, kind=setup["kind"], num_classes=setup["classes"])
    optimizer = build_optimizer(model, experiment.optim)
    wrapped = DistributedDataParallel(model)
    times = []
    for _ in range(setup["steps"]):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, device):
            logits = wrapped(images)
        loss = criterion(logits, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), experiment.optim.clip_norm)
        optimizer.step()
        float(loss.detach())
        times.append(time.perf_counter() - began)
    if rank == 0:
        print(json.dumps({"step": median(times[min(5, len(times) - 1) :])}))
    dist.destroy_process_group()


def first_step(task: Any, runtime: Any, _report: Any) -> None:
    """A group's whole work: one step, and the time at which it was done."""
    import torch

    model, optimizer, _ = runtime.prepare(torch.nn.Linear(8, 8), lambda m: torch.optim.SGD(m.parameters()), _Batches())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    if runtime.is_main:
        Path(task).write_text(str(time.time()), encoding="utf-8")


class _Batches:
    def shard(self, _rank: int, _ranks: int) -> _Batches:
        return self


def _bare_first_step(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    model = prepare_model(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["path"]).write_text(str(time.time()), encoding="utf-8")


def _measure_starts(work: Path, whens: list[str]) -> None:
    """Seconds from the call to the first step, cold and warm, by both in one driver's session each."""
    from medray.engines.ray.session import ray_session
    from medray.engines.ray.train import GroupSize, run_group

    def ours(path: Path) -> None:
        run_group(first_step, str(path), GroupSize(workers=2))

    def bare(path: Path) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            _bare_first_step,
            train_loop_config={"path": str(path)},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(work / "ray")),
        ).fit()

    found: dict[str, dict[str, float]] = {}
    for name, start in (("bare", bare), ("medray", ours)):
        with ray_session(cpus=2):
            for when in whens:
                path = work / f"{name}-{when}"
                began = time.time()
                start(path)
                found.setdefault(name, {})[when] = float(path.read_text(encoding="utf-8")) - began
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One contender, in a process of its own.")
    parser.add_argument("what", choices=["ours", "plain", "starts"])
    parser.add_argument("work", type=Path)
    for option in ("--workers", "--threads"):
        parser.add_argument(option, type=int, default=1)
    parser.add_argument("--warm", action="store_true")
    asked = parser.parse_args()
    if asked.what == "ours":
        _train(asked.work, asked.workers, asked.threads)
    elif asked.what == "plain":
        _plain(asked.work)
    else:
        _measure_starts(asked.work, ["cold", "warm"] if asked.warm else ["cold"])
