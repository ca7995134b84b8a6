"""Noise: its distribution, and that it can't be foretold."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from medray.privacy.noise import SecureRandom, add_normal

KEY = bytes(range(32))


def test_it_is_normal_and_independent() -> None:
    drawn = SecureRandom(KEY).normal(300_001)
    assert drawn.shape == (300_001,) and stats.kstest(drawn, "norm").pvalue > 0.01
    assert abs(drawn.mean()) < 0.01 and abs(drawn.std() - 1) < 0.01 and abs(stats.kurtosis(drawn)) < 0.05
    half = len(drawn) // 2  # halves come of one radius each: the sine's and the cosine's
    for lag in (1, half, half + 1, 1 << 17):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 0.01
    assert abs(np.corrcoef(np.abs(drawn[:half]), np.abs(drawn[half : 2 * half]))[0, 1]) < 0.01


def test_uniforms_and_lots() -> None:
    random = SecureRandom(KEY)
    uniform = random.uniform(100_000)
    assert uniform.min() > 0 and uniform.max() <= 1 and stats.kstest(uniform, "uniform").pvalue > 0.01
    sizes = [len(random.lots(200, 0.1)) for _ in range(2000)]
    assert abs(np.mean(sizes) - 20) < 0.5 and abs(np.var(sizes) - 18) < 2.5
    assert len(random.lots(50, 1.0)) == 50


def test_no_two_generators_are_alike_unless_their_key_is() -> None:
    assert not np.array_equal(SecureRandom().words(4), SecureRandom().words(4))
    assert np.array_equal(SecureRandom(KEY).words(4), SecureRandom(KEY).words(4))
    random = SecureRandom(KEY)
    first = random.words(4)
    random._left = 0  # the counter is used up: a new key, not the stream again
    assert not np.array_equal(first, random.words(4))


def test_the_stream_is_chacha20s() -> None:
    # RFC 8439, appendix A.1, test vector 1: key, nonce and counter of zeros.
    block = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert SecureRandom(bytes(32)).words(4).tobytes().hex() == block


def test_noise_is_added_in_double_precision() -> None:
    values = torch.full((7, 3), 1e6)
    found = add_normal(values, 0.5, SecureRandom(KEY))
    expected = values.double() + 0.5 * torch.from_numpy(SecureRandom(KEY).normal(21)).view(7, 3)
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())
