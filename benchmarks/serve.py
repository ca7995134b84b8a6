"""How much of its bare engine's speed does a served model keep over HTTP?

ResNet-18, 224 px, float32 tensors as raw bytes of the Open Inference Protocol, 8 clients, ONNX Runtime on all CPUs. The
bare engine (batches of 8, in this process, nothing else running) and the server take turns, five times each; the figure
is the median of the ratios. The clients share the CPUs with the server, as they do not with the bare engine.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks._server import Load, load, serving
from benchmarks.common import Figure, Result, Target
from medray.bundle.read import Bundle
from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig
from medray.models.catalogue import build_model

CLIENTS, SIZE = 8, 224
SECONDS, QUICK_SECONDS = 15.0, 2.0
TURNS, QUICK_TURNS = 5, 1


def write_resnet(directory: Path, size: int = SIZE) -> Path:
    """An untrained ResNet-18: its speed is that of a trained one."""
    torch.manual_seed(0)
    config = ModelConfig(name="timm:resnet18")
    shape = (size, size)
    model = build_model(config, kind="classification", ndim=2, in_channels=3, num_outputs=2, patch_size=shape)
    write_bundle(
        directory,
        kind="classification",
        ndim=2,
        channels=3,
        classes=["normal", "ill"],
        preprocess=PreprocessConfig(size=shape),
        inference=InferenceSpec(),
        models=[model],
        configs=[config],
    )
    return directory


def bare(bundle: Path, seconds: float) -> float:
    """Images a second of the engine alone, in batches of 8."""
    engine = Bundle.open(bundle).predictor("onnx")
    batch = np.random.default_rng(0).normal(size=(8, 3, SIZE, SIZE)).astype(np.float32)
    engine(batch)
    begin, count = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        engine(batch)
        count += len(batch)
    return count / (time.monotonic() - begin)


def tensors(address: tuple[str, int], seconds: float) -> Load:
    """One image a request."""
    array = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    tensor = {
        "name": "image",
        "datatype": "FP32",
        "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    body, headers = head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}

    def request(connection: http.client.HTTPConnection) -> None:
        connection.request("POST", "/v2/models/resnet/infer", body, headers)

    return load(address, CLIENTS, seconds, request)


def run(quick: bool) -> Result:
    """Figures: served over bare, and the rate and latency of requests that compute nothing."""
    seconds, turns = (QUICK_SECONDS, QUICK_TURNS) if quick else (SECONDS, TURNS)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_resnet(Path(folder) / "bundle")
        alone, served, nothing = [], [], Load()
        for turn in range(turns):
            alone.append(bare(bundle, seconds))
            with serving(Path(folder) / f"server-{turn}", {"resnet": bundle}) as address:
                tensors(address, min(2.0, seconds))  # warm
                served.append(tensors(address, seconds))
                if turn == turns - 1:
                    nothing = load(address, CLIENTS, seconds, lambda c: c.request("GET", "/v2/health/live"))
    ratios = sorted(one.rate / rate for one, rate in zip(served, alone, strict=True))
    last = served[-1]
    figures = {
        "served_over_bare": Figure(value=statistics.median(ratios), low=ratios[0], high=ratios[-1]),
        "bare": Figure(value=statistics.median(alone), unit="img/s"),
        "served": Figure(value=statistics.median(one.rate for one in served), unit="img/s"),
        "p99_over_p50": Figure(value=last.quantile(0.99) / last.quantile(0.5)),
        "p50": Figure(value=1000 * last.quantile(0.5), unit="ms"),
        "failed": Figure(value=float(sum(one.failed for one in served))),
        "no_op": Figure(value=nothing.rate, unit="req/s"),
        "no_op_p50": Figure(value=1000 * nothing.quantile(0.5), unit="ms"),
    }
    targets = (
        {}
        if quick
        else {
            "served_over_bare": Target(op=">=", value=0.9),
            "p99_over_p50": Target(op="<=", value=2.0),
            "no_op": Target(op=">=", value=1000.0),
            "failed": Target(op="==", value=0.0),
        }
    )
    return Result(
        figures=figures,
        targets=targets,
        notes=[
            f"{CLIENTS} clients in one Python process, on the {len(os.sched_getaffinity(0))} CPUs of the server.",
            "LitServe and BentoML are not among the peers that 'make bench-peers' installs; not measured.",
        ],
    )
