"""A plain Flower app for comparison: our network, batch size and optimiser, and nothing around them."""

from __future__ import annotations

import time
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from medray.config.schema import ModelConfig
from medray.models.catalogue import build_model


@lru_cache(maxsize=16)
def _data(path: Path) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return arrays, network(tuple(arrays["train_x"].shape[1:]))


def network(shape: tuple[int, ...]) -> torch.nn.Module:
    """The network that both train, for images (C, H, W)."""
    torch.manual_seed(0)
    config = ModelConfig(name="small_cnn", feature_size=8)
    return build_model(config, kind="classification", ndim=2, in_channels=shape[0], num_outputs=2, patch_size=shape[1:])


def client(folder: Path, batch: int, lr: float) -> ClientApp:
    """Trains one epoch a round on ``folder/NUMBER.npz``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        data, model = _data(folder / f"{context.node_config['partition-id']}.npz")
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        order = torch.randperm(len(data["train_x"]))
        total = 0.0
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(data["train_x"][rows]), data["train_y"][rows])
            loss.backward()
            optimizer.step()
            total += float(loss)
        metrics = MetricRecord({"num-examples": len(order), "loss": total})
        content = RecordDict({"arrays": ArrayRecord(OrderedDict(model.state_dict())), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        data, model = _data(folder / f"{context.node_config['partition-id']}.npz")
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        model.eval()
        with torch.inference_mode():
            right = (model(data["val_x"]).argmax(1) == data["val_y"]).float().mean()
        metrics = MetricRecord({"num-examples": len(data["val_x"]), "accuracy": float(right)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def serve(grid: Grid, rounds: int, shape: tuple[int, ...], sites: int) -> float:
    """Run FedAvg; the seconds that its rounds took, without the start of anything."""
    strategy = FedAvg(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
    began = time.monotonic()
    strategy.start(grid, ArrayRecord(OrderedDict(network(shape).state_dict())), num_rounds=rounds)
    return time.monotonic() - began


def simulate(
    folder: Path, *, sites: int, rounds: int, shape: tuple[int, ...], batch: int, lr: float, cpus: int
) -> float:
    """The seconds of the rounds, by Flower's simulation on Ray."""
    from flwr.simulation import run_simulation

    found: list[float] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        found.append(serve(grid, rounds, shape, sites))

    backend: Any = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}}
    run_simulation(app, client(folder, batch, lr), sites, backend_config=backend)
    return found[0]
