"""Corruptions: worse with severity, the same each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medray.learn.corrupt import CORRUPTIONS, SEVERITIES, corrupt


def image(ndim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 100 * torch.rand(2, *(24, 20, 18)[:ndim], generator=generator) - 30


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_grows_with_severity_and_repeats(ndim: int, name: str) -> None:
    clean = image(ndim)
    before = clean.clone()
    results = [corrupt(clean, name, severity, seed=5) for severity in SEVERITIES]  # type: ignore[arg-type]
    gaps = [float((result - clean).abs().mean()) for result in results]
    assert 0 < gaps[0] < gaps[1] < gaps[2]
    assert torch.equal(clean, before) and all(r.shape == clean.shape and r.isfinite().all() for r in results)
    assert torch.equal(corrupt(clean, name, 2, seed=5), results[1])  # type: ignore[arg-type]
    scaled = corrupt(1000 * clean + 7, name, 2, seed=5)  # type: ignore[arg-type]
    assert torch.allclose(scaled, 1000 * results[1] + 7, rtol=1e-3, atol=1.0)


def test_a_constant_stays_and_noise_follows_its_seed() -> None:
    flat = torch.full((1, 9, 9), 3.0)
    assert all(torch.allclose(corrupt(flat, name, 3), flat) for name in CORRUPTIONS)
    assert not torch.equal(corrupt(image(2), "noise", 1, seed=1), corrupt(image(2), "noise", 1, seed=2))


def test_blur_keeps_the_sum_of_a_point() -> None:
    point = torch.zeros(1, 31, 31)
    point[0, 15, 15] = 1.0
    blurred = corrupt(point, "blur", 3)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-4)
    assert float(blurred.max()) == pytest.approx(1 / (2 * torch.pi * 2.0**2), rel=0.02)


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="there are noise, blur, contrast, low_resolution"):
        corrupt(image(2), "rain", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="severity 4"):
        corrupt(image(2), "noise", 4)
    with pytest.raises(ValueError, match="spatial axes"):
        corrupt(torch.zeros(4, 4), "noise", 1)
