"""What every Runtime owes fit(). A new runtime joins by one line in RUNTIMES."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from medray.config.schema import Experiment
from medray.learn.optimizers import build_optimizer
from medray.models.norms import group_norms
from medray.tasks.catalogue import build_loss
from medray.train.fit import fit
from medray.train.runtime import LocalRuntime, Runtime
from tests.unit.train.test_fit import Blobs, accuracy, experiment, network


def group_of_one() -> Runtime:
    """Groups of several, and that they learn what one process does: tests/integration/ray/test_group.py."""
    from medray.engines.ray.group import GroupRuntime

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return GroupRuntime("cpu")


def private() -> Runtime:
    """With hardly any noise: what it does with more is in tests/unit/privacy."""
    from medray.config.privacy import PrivacyConfig
    from medray.privacy.accountant import PrivacyPlan
    from medray.privacy.runtime import PrivateRuntime

    plan = PrivacyPlan(
        noise_multiplier=1e-3,
        sample_rate=0.25,
        steps=1000,
        units=32,
        epsilon=1e9,
        delta=1e-3,
        accountant="rdp",
        unit="record",
        clip_norm=10.0,
    )
    return PrivateRuntime(plan, PrivacyConfig(unit="record"))


RUNTIMES: dict[str, Callable[[], Runtime]] = {"local": LocalRuntime, "group": group_of_one, "private": private}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    yield RUNTIMES[request.param]()
    if dist.is_initialized():
        dist.destroy_process_group()


def net(runtime: Runtime) -> nn.Module:
    """Batch normalisation is nothing that can be private."""
    return group_norms(network()) if getattr(runtime, "private", False) else network()


def test_prepare_gives_a_model_on_the_device_whose_optimiser_owns_its_parameters(runtime: Runtime) -> None:
    spec = Experiment()
    bare = net(runtime)
    model, optimizer, loader = runtime.prepare(bare, lambda m: build_optimizer(m, spec.optim), Blobs())
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # The caller's module is trained in place, whatever it is wrapped in.
    assert owned == {id(p) for p in bare.parameters()} == {id(p) for p in model.parameters()}
    assert {p.device.type for p in bare.parameters()} == {runtime.device.type}
    assert len(loader) == 4  # type: ignore[arg-type]
    assert {"image", "target", "index"} <= next(iter(loader)).keys()


def test_criterion_gives_a_scalar_with_a_gradient(runtime: Runtime) -> None:
    spec = experiment()
    loss = runtime.criterion(build_loss(spec.loss, kind="classification", num_classes=2))
    logits = torch.zeros(4, 2, device=runtime.device, requires_grad=True)
    value = loss(logits, torch.tensor([0, 1, 1, 0], device=runtime.device))
    value.backward()
    assert value.shape == () and float(logits.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_reduce_keeps_keys_and_ratios_and_agree_is_a_plain_bool(runtime: Runtime) -> None:
    found = runtime.reduce({"sum": 6.0, "count": 3.0})
    assert found.keys() == {"sum", "count"} and found["sum"] / found["count"] == pytest.approx(2.0)
    assert runtime.agree(True) is True and runtime.agree(False) is False
    assert isinstance(runtime.is_main, bool) and isinstance(runtime.is_alone, bool) and runtime.lane >= 0
    table = runtime.reduce({"rows": [[1.0, float("nan")]], "nothing": []})
    assert table["rows"].shape == (1, 2) and table["rows"][0, 0] == 1.0 and table["nothing"].shape == (0,)


def test_what_is_shared_is_whole(runtime: Runtime) -> None:
    """Alone, or as a group of one, a process has it all."""
    assert list(runtime.share([3, 1, 2])) == [3, 1, 2] and list(runtime.share([])) == []
    assert runtime.from_main({"step": 3, "weights": [torch.ones(2)]})["step"] == 3
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(7.0)  # type: ignore[union-attr]
    runtime.align(norm)
    assert norm.running_mean.tolist() == [7.0, 7.0]  # type: ignore[union-attr]


def test_no_sync_lets_gradients_accumulate(runtime: Runtime) -> None:
    model, optimizer, _ = runtime.prepare(nn.Linear(2, 1), lambda m: torch.optim.SGD(m.parameters()), Blobs())
    x = torch.ones(1, 2, device=runtime.device)
    with runtime.no_sync(model):
        model(x).sum().backward()
    model(x).sum().backward()
    weight = next(p for group in optimizer.param_groups for p in group["params"] if p.ndim == 2)
    assert torch.allclose(weight.grad, torch.full_like(weight, 2.0))  # type: ignore[arg-type]


def test_fit_trains_through_it(runtime: Runtime) -> None:
    spec = experiment(train__epochs=15, train__micro_batch=3)
    loss = build_loss(spec.loss, kind="classification", num_classes=2)
    result = fit(spec, net(runtime), Blobs(), loss, validate=accuracy, objective=("val/loss", "min"), runtime=runtime)
    assert result.best["val/accuracy"] > 0.9 and {v.device.type for v in result.weights.values()} == {"cpu"}
