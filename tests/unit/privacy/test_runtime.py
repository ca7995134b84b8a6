"""Private training: the trajectory of the formula, with and without the proximal term; what fit() keeps to itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medray.config.privacy import PrivacyConfig
from medray.config.schema import Experiment, LossConfig, OptimConfig
from medray.errors import PrivacyError
from medray.learn.optimizers import build_optimizer
from medray.learn.proximal import attach_proximal
from medray.privacy.accountant import PrivacyPlan
from medray.privacy.noise import SecureRandom
from medray.privacy.runtime import PrivateRuntime
from medray.tasks.catalogue import build_loss
from medray.train.fit import fit
from medray.train.runtime import LocalRuntime

CLIP, SIGMA, RATE, UNITS, LR, MU = 0.7, 1.3, 0.25, 16, 0.05, 0.4


class Fixed:
    """Batches as given, an empty one among them, in place of lots."""

    units = UNITS

    def __init__(self, sizes: tuple[int, ...] = (5, 0, 3, 7, 1, 4)) -> None:
        generator = torch.Generator().manual_seed(5)
        self.batches = [
            {
                "image": torch.randn(n, 1, 2, 3, generator=generator),
                "target": torch.randint(0, 3, (n,), generator=generator),
                "index": torch.arange(n),
            }
            for n in sizes
        ]

    def poisson(self, rate: float, source: Any, *, groups: Any = None) -> Fixed:
        assert rate == RATE and isinstance(source, SecureRandom) and groups is None
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def plan(**changes: Any) -> PrivacyPlan:
    tree: dict[str, Any] = {
        "noise_multiplier": SIGMA,
        "sample_rate": RATE,
        "steps": 12,
        "units": UNITS,
        "epsilon": 9.0,
        "delta": 1e-3,
        "accountant": "rdp",
        "unit": "record",
        "clip_norm": CLIP,
    }
    return PrivacyPlan(**{**tree, **changes})


def config(**changes: Any) -> PrivacyConfig:
    return PrivacyConfig.model_validate({"epsilon": 9.0, "unit": "record", "secure": False, **changes})


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "device": "cpu",
            "loss": {"name": "cross_entropy"},
            "optim": {"name": "sgd", "lr": LR, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": 0.0},
            "schedule": {"name": "constant", "warmup": 0.0},
            "train": {"epochs": 2, "precision": "fp32", "batch_size": 4},
            "privacy": {"epsilon": 9.0, "unit": "record"},
            **changes,
        }
    )


def by_formula(mu: float, *, private: bool) -> list[Tensor]:
    """DP-SGD (Abadi et al. 2016, algorithm 1) and FedProx's step with Nesterov momentum, in double precision."""
    model = network().double()
    weights = [p.detach().clone() for p in model.parameters()]
    start, buffers = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    random = SecureRandom(hashlib.sha256(b"medray test 0").digest())
    for _ in range(2):
        for batch in Fixed().batches:
            total = [torch.zeros_like(w) for w in weights]
            for image, target in zip(batch["image"].double(), batch["target"], strict=True):
                with torch.no_grad():
                    for p, w in zip(model.parameters(), weights, strict=True):
                        p.copy_(w)
                loss = nn.functional.cross_entropy(model(image[None]), target[None])
                grads = torch.autograd.grad(loss, list(model.parameters()))
                norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
                scale = min(1.0, CLIP / norm) if private else 1.0
                total = [a + scale * g for a, g in zip(total, grads, strict=True)]
            for i, w in enumerate(weights):
                gradient = total[i] / (RATE * UNITS)
                if private:
                    noise = torch.from_numpy(random.normal(w.numel())).view(w.shape)
                    gradient = (total[i] + SIGMA * CLIP * noise) / (RATE * UNITS)
                elif len(batch["image"]):
                    gradient = total[i] / len(batch["image"])
                gradient = gradient + mu * (w - start[i])
                buffers[i] = 0.9 * buffers[i] + gradient
                weights[i] = w - LR * (gradient + 0.9 * buffers[i])
    return weights


@pytest.mark.parametrize("mu", [0.0, MU])
@pytest.mark.parametrize("mode", ["loop", "hooks", "functorch", "ghost"])
def test_the_trajectory_is_that_of_the_formula(mode: str, mu: float) -> None:
    spec, model = experiment(), network()
    asked = config(mode=mode, physical_batch=2)  # batches go through memory in parts
    runtime = PrivateRuntime(plan(), asked, proximal_mu=mu, w_global=network().state_dict())
    loss = build_loss(spec.loss, kind="classification", num_classes=3)
    result = fit(
        spec, model, Fixed(), loss, validate=lambda _: {"val/x": 0.5}, objective=("val/x", "max"), runtime=runtime
    )
    assert runtime.steps == result.steps == 12 and runtime.mode == mode
    for found, expected in zip(result.weights.values(), by_formula(mu, private=True), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_the_proximal_step_without_privacy_is_that_of_the_formula() -> None:
    model = network()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=LR, momentum=0.9, weight_decay=0.0))
    attach_proximal(optimizer, model, MU)
    for _ in range(2):
        for batch in Fixed().batches:
            optimizer.zero_grad()
            if len(batch["image"]):
                nn.functional.cross_entropy(model(batch["image"]), batch["target"]).backward()
            optimizer.step()
    for found, expected in zip(model.parameters(), by_formula(MU, private=False), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def run(tmp_path: Path | None = None, *, steps: int = 12, validate: Any = None, **options: Any) -> Any:
    spec = experiment(**options)
    runtime = PrivateRuntime(plan(steps=steps), config())
    calls: list[int] = []

    def measured(_model: nn.Module) -> dict[str, float]:
        calls.append(1)
        return {"val/x": float("nan")}

    told: dict[str, float] = {}

    class Tracker:
        def scalars(self, values: dict[str, float], _step: int) -> None:
            told.update(values)

    loss = build_loss(spec.loss, kind="classification", num_classes=3)
    result = fit(
        spec,
        network(),
        Fixed(),
        loss,
        validate=validate or measured,
        objective=("val/x", "max"),
        runtime=runtime,
        run_dir=tmp_path,
        tracker=Tracker(),  # type: ignore[arg-type]
    )
    return result, runtime, calls, told


def test_nothing_is_told_of_private_samples_and_the_last_weights_count() -> None:
    result, _, calls, told = run()
    assert calls == [1]  # one look at the validation cases, in the end
    assert result.best == {} and result.stopped == "finished"
    assert not [name for name in told if "loss" in name or "samples" in name] and "train/lr" in told
    assert "loss" not in result.history[-1]
    for found, expected in zip(result.weights.values(), by_formula(0.0, private=True), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_no_step_beyond_the_plan_is_made() -> None:
    with pytest.raises(PrivacyError, match="the plan has 11 private steps, and all are made"):
        run(steps=11)


def test_a_run_that_goes_on_counts_the_steps_of_before(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def dies(_model: nn.Module) -> dict[str, float]:
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, validate=dies)
    _, runtime, _, _ = run(tmp_path)
    assert (runtime.done, runtime.steps) == (0, 12)  # what was lost was never released, and is made again
    _, runtime, _, _ = run(tmp_path)
    assert (runtime.done, runtime.steps) == (12, 0)


def test_privacy_is_never_lost_without_a_word() -> None:
    spec = experiment()
    loss = build_loss(spec.loss, kind="classification", num_classes=3)
    with pytest.raises(PrivacyError, match="LocalRuntime trains without differential privacy"):
        fit(spec, network(), Fixed(), loss, validate=lambda _: {}, objective=("x", "max"), runtime=LocalRuntime())
    with pytest.raises(PrivacyError, match="can't draw Poisson samples"):
        PrivateRuntime(plan(), config()).prepare(network(), lambda m: torch.optim.SGD(m.parameters()), [])
    with pytest.raises(PrivacyError, match="has 16 records, and noise was planned for 17"):
        PrivateRuntime(plan(units=17), config()).prepare(network(), lambda m: torch.optim.SGD(m.parameters()), Fixed())
    with pytest.raises(PrivacyError, match="batch_dice"):
        PrivateRuntime(plan(), config()).criterion(
            build_loss(LossConfig(name="dice"), kind="segmentation", num_classes=2)
        )
    with pytest.raises(PrivacyError, match="needs the patient of each case"):
        PrivateRuntime(plan(unit="patient"), config(unit="patient"))


def test_secret_randomness_differs_from_run_to_run() -> None:
    first, second = (PrivateRuntime(plan(), config(secure=True)).random.words(4).tolist() for _ in range(2))
    assert first != second
    assert json.dumps(first)
