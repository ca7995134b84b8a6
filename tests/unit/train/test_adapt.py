"""Augmentation that follows the validation: when it moves, when it doesn't, and that a resumed run draws the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medray.errors import ConfigError
from medray.train.adapt import AdaptiveStrength
from tests.unit.train.test_fit import Blobs, experiment, run, same


def follow(values: list[float], start: float = 0.5, mode: Any = "max") -> list[float]:
    """The strength in each epoch, one validation an epoch."""
    adaptive = AdaptiveStrength(start, mode)
    found = []
    for epoch, value in enumerate(values):
        found.append(adaptive.at(epoch))
        adaptive.observe(epoch, value)
    return found


def test_a_fall_over_five_epochs_weakens_and_a_clear_rise_strengthens() -> None:
    falling = [0.9 - 0.01 * epoch for epoch in range(8)]
    assert follow(falling) == [0.5] * 5 + [0.4] * 3
    assert follow(falling, mode="min") == [0.5] * 5 + [0.6] * 3  # a loss that falls is a rise


def test_each_change_waits_for_five_epochs_of_its_own_and_stays_within_bounds() -> None:
    rising = [0.1 + 0.01 * epoch for epoch in range(31)]
    assert follow(rising, 0.8)[::5] == [0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert min(follow([-value for value in rising], 0.2)) == pytest.approx(0.1)


def test_noise_moves_little() -> None:
    """Around a level, over many runs: the average strength stays, and most of the time nothing happens."""
    rng = np.random.default_rng(0)
    ends = [follow(list(rng.normal(0.8, 0.02, 20)))[-1] for _ in range(200)]
    assert abs(np.mean(ends) - 0.5) < 0.05
    assert follow([0.8] * 30) == [0.5] * 30


def test_few_validations_are_waited_for_and_undefined_ones_ignored() -> None:
    adaptive = AdaptiveStrength(0.5, "max")
    for epoch, value in ((0, 0.9), (8, float("nan")), (20, 0.8)):
        adaptive.observe(epoch, value)
    assert adaptive.at(21) == 0.5
    adaptive.observe(40, 0.7)
    assert (adaptive.at(40), adaptive.at(41)) == (0.5, 0.4)


def test_its_state_goes_through_json() -> None:
    adaptive = AdaptiveStrength(0.5, "max")
    for epoch in range(7):
        adaptive.observe(epoch, -float(epoch))
    again = AdaptiveStrength(0.5, "max")
    again.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
    for epoch in range(7, 20):
        assert again.at(epoch) == adaptive.at(epoch)
        for one in (again, adaptive):
            one.observe(epoch, -float(epoch))


class Noisy(Blobs):
    """Blobs under noise of the strength that is set; notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.strength, self.seen = -1.0, []  # type: ignore[var-annotated]

    def set_strength(self, strength: float) -> None:
        self.strength = strength
        self.seen.append(strength)

    def draw(self, seed: int) -> dict[str, torch.Tensor]:
        batch = super().draw(seed)
        noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(seed))
        return batch | {"image": batch["image"] + self.strength * noise}


def worse(model: Any) -> dict[str, float]:
    worse.calls += 1  # type: ignore[attr-defined]
    return {"val/loss": float(worse.calls)}  # type: ignore[attr-defined]


def test_a_run_follows_it_and_resumes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = experiment(
        train__epochs=14, train__validate_every=1, augment__adaptive=True, augment__strength=0.5, train__ema=0.0
    )
    worse.calls = 0  # type: ignore[attr-defined]
    loader = Noisy()
    whole = run(spec, loader, validate=worse)
    assert loader.seen[0] == 0.5 and loader.seen[-1] == pytest.approx(0.3)
    worse.calls = 0  # type: ignore[attr-defined]

    class Killed(Exception):
        pass

    def kill(progress: Any) -> bool:
        if progress.epoch == 9:
            raise Killed
        return False

    with pytest.raises(Killed):
        run(spec, Noisy(), validate=worse, run_dir=tmp_path, on_validation=kill)
    worse.calls -= 1  # type: ignore[attr-defined]  # the ninth was not saved, and is measured again
    again = Noisy()
    assert same(run(spec, again, validate=worse, run_dir=tmp_path).weights, whole.weights)
    assert again.seen[-1] == loader.seen[-1]


def test_a_loader_that_cannot_is_refused() -> None:
    with pytest.raises(ConfigError, match="adaptive"):
        run(experiment(augment__adaptive=True))
