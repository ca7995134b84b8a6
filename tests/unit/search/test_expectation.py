"""What one more trial is expected to bring."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medray.search.expectation import expected_gain


def test_the_expected_gain_is_that_of_a_normal_fit() -> None:
    """Against the integral of (x - best)+ under the fitted normal density, by a fine sum."""
    values = [0.70, 0.74, 0.69, 0.78, 0.75]
    mean, std = np.mean(values), np.std(values, ddof=1)
    x = np.linspace(max(values), mean + 12 * std, 200_001)
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    assert expected_gain(values, "max") == pytest.approx(np.trapezoid((x - max(values)) * density, x), rel=1e-4)


def test_losses_gain_downwards() -> None:
    values = [0.70, 0.74, 0.69, 0.78, 0.75]
    assert expected_gain([-v for v in values], "min") == pytest.approx(expected_gain(values, "max"))


def test_the_expected_gain_needs_values_and_falls_when_one_stands_out() -> None:
    assert expected_gain([0.1, 0.2, 0.3], "max") is None
    assert expected_gain([0.5] * 4, "max") == 0.0
    assert 0 < expected_gain([0.7, 0.71, 0.72, 0.73, 0.95], "max") < expected_gain([0.7, 0.75, 0.8, 0.9, 0.95], "max")
