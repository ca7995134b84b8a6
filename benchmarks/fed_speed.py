"""What does medray add to a bare Flower app with the same network, batches and rounds, and what does it save?

Both run in turn, several times, on the same phantoms: ours and the bare app on Ray by Flower's simulation, and ours
within one process. Rounds are timed from the first message to the last; starting Ray and importing count for neither.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import Figure, Result, Target
from medray.config.schema import Experiment
from medray.data.cache import PreparedStore
from medray.data.layouts import build_manifest
from medray.data.partition import deal_out
from medray.data.splits import make_splits
from medray.engines.flower.parcel import Hub
from medray.engines.ray.session import ray_session, usable_cpus
from medray.workflows.federation.rounds import Rounds
from medray.workflows.federation.shared import arrays_of, shared_names, statistics_of
from medray.workflows.federation.site import SiteFolder, opener

from benchmarks import _bare_flower as bare  # isort: skip  (after medray: it turns Flower's telemetry off)

SIZE, BATCH, LR = 32, 16, 1e-3


def experiment(rounds: int) -> Experiment:
    """What both train: nothing random but the order of cases."""
    off = dict.fromkeys(("strength", "p_affine", "p_elastic", "p_flip", "p_brightness", "p_contrast"), 0.0)
    off |= dict.fromkeys(("p_gamma", "p_noise", "p_blur", "p_low_resolution"), 0.0)
    return Experiment.model_validate(
        {
            "device": "cpu",
            "model": {"name": "small_cnn", "feature_size": 8},
            "loss": {"name": "cross_entropy"},
            "optim": {"lr": LR, "clip_norm": 0.0},
            "schedule": {"name": "constant", "warmup": 0.0},
            "augment": off,
            "preprocess": {"size": (SIZE, SIZE)},
            "train": {"batch_size": BATCH, "precision": "fp32"},
            "split": {"test": 0.0},
            "federation": {"rounds": rounds, "quorum": 3},
        }
    )


def prepare(work: Path, spec: Experiment, cases: int) -> tuple[tuple[SiteFolder, ...], tuple[int, ...]]:
    """Our sites' folders, and the bare app's arrays beside them; the shape of an image."""
    manifest = build_manifest(f"phantom://xray-nodules?cases={cases}&size={SIZE}")
    folders = []
    for number, (name, indices) in enumerate(deal_out(manifest, spec.federation.partition).items()):
        own = manifest.model_copy(update={"cases": tuple(manifest.cases[i] for i in indices)})
        folder = work / name
        own.save(folder / "manifest.json")
        folders.append(SiteFolder(name=name, directory=str(folder), cache=str(work / "cache")))
        store = PreparedStore.open_or_build(own, spec.preprocess, work / "cache")
        splits = make_splits(own, spec.split, spec.split.seed)
        arrays: dict[str, Any] = {}
        for side, rows in (("train", splits.train), ("val", splits.val)):
            arrays[f"{side}_x"] = np.stack([store.image(row) for row in rows])
            arrays[f"{side}_y"] = np.array([store.label(row) for row in rows])
        np.savez(work / f"{number}.npz", **arrays)
    return tuple(folders), (manifest.channels, SIZE, SIZE)


def ours(
    work: Path, folders: tuple[SiteFolder, ...], spec: Experiment, shape: tuple[int, ...], cpus: int | None
) -> float:
    """The seconds of our rounds: on Ray with ``cpus`` a site, in this process where it is None."""
    model = bare.network(shape)
    shared = shared_names(model, spec.federation)
    names = tuple(folder.name for folder in folders)
    out = Path(tempfile.mkdtemp(dir=work))
    for folder in folders:
        for state in Path(folder.directory).glob("state-*.pt"):
            state.unlink()

    def serve(hub: Hub) -> float:
        while len(hub.sites()) < len(names):  # on Ray they come up after the server
            time.sleep(0.1)
        began = time.monotonic()
        made = Rounds(hub, out, spec, arrays_of(model, shared), statistics_of(model), objective=("val/accuracy", "max"))
        made.run(names)
        return time.monotonic() - began

    if cpus is None:
        from medray.engines.flower.inprocess import in_process

        return serve(in_process(opener(folders), len(folders)))
    from medray.engines.flower.simulation import simulate

    return simulate(opener(folders), len(folders), serve, cpus=cpus, gpus=0.0)


def run(quick: bool) -> Result:
    """Figures: seconds a round of each, overhead over the bare app, and how many times faster one process is."""
    rounds, cases, repeats = (3, 60, 1) if quick else (20, 1200, 3)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    spec = experiment(rounds)
    cpus = usable_cpus()
    each = max(1, cpus // 3)
    times: dict[str, list[float]] = {"ray": [], "bare": [], "here": []}
    with tempfile.TemporaryDirectory(prefix="medray-speed-") as folder:
        work = Path(folder)
        folders, shape = prepare(work, spec, cases)
        for _ in range(repeats):
            with ray_session(cpus=cpus, threads=each):
                times["ray"].append(ours(work, folders, spec, shape, each))
            with ray_session(cpus=cpus, threads=each):
                how = {"sites": len(folders), "rounds": rounds, "batch": BATCH, "lr": LR, "cpus": each}
                times["bare"].append(bare.simulate(work, shape=shape, **how))  # type: ignore[arg-type]
            times["here"].append(ours(work, folders, spec, shape, None))
    middle = {name: median(found) for name, found in times.items()}
    figures = {
        "seconds_a_round_on_ray": Figure(value=middle["ray"] / rounds, unit="s"),
        "seconds_a_round_in_process": Figure(value=middle["here"] / rounds, unit="s"),
        "overhead_over_bare": Figure(value=middle["ray"] / middle["bare"] - 1),
        "in_process_speedup": Figure(value=middle["bare"] / middle["here"]),
    }
    return Result(
        figures=figures,
        targets={}
        if quick
        else {
            "overhead_over_bare": Target(op="<=", value=0.05),
            "in_process_speedup": Target(op=">=", value=5.0),
        },
        peers={"bare Flower": {"seconds_a_round_on_ray": Figure(value=middle["bare"] / rounds, unit="s")}},
        notes=[
            f"{rounds} rounds of one epoch at 3 sites with {cases} films of {SIZE} px in all, a small CNN; medians of "
            f"{repeats} turn(s). Ours also checks every update, keeps each site's optimiser and writes each round."
        ],
    )
