"""Normal noise from a cryptographic generator, hardened against attacks through floating point.

ChaCha20 (RFC 8439), keyed anew from the operating system for every generator, gives 64-bit words; Box and Muller's
transform (1958) makes two normals of two uniforms of 53 bits. A single draw of double precision leaves gaps that betray
the value it was added to (Mironov 2012, doi:10.1145/2382196.2382264; Jin et al. 2022, arXiv:2112.05307). As Holohan
and Braghin propose (2021, arXiv:2107.10138), each number is therefore the sum of 2n = 4 draws over sqrt(4), whose
mantissas can't be enumerated: some 2^159 cases, as in Opacus' secure mode.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["SecureRandom", "add_normal"]

DRAWS = 4
"""Normals that are added up for one; see the head of this file."""
CHUNK = 1 << 18
"""Numbers made at once: what stays in a processor's cache."""


class SecureRandom:
    """A stream of random numbers that nobody can foretell or repeat.

    Args:
        key: 32 bytes; None takes them from the operating system. A known key is for tests alone.
    """

    def __init__(self, key: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        # A key is used with one nonce only, so that the nonce may be constant.
        cipher = Cipher(algorithms.ChaCha20(os.urandom(32) if key is None else key, bytes(16)), mode=None)
        self._stream: Callable[[bytes], bytes] = cipher.encryptor().update
        self._left = 1 << 37  # bytes until the 32-bit counter of 64-byte blocks would wrap, with a margin

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """``count`` independent words of 64 bits."""
        if 8 * count > self._left:
            self.__init__()  # type: ignore[misc]
        self._left -= 8 * count
        return np.frombuffer(self._stream(bytes(8 * count)), dtype=np.uint64)

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """``count`` numbers in (0, 1]: multiples of 2^-53, zero left out so that its logarithm is never asked for."""
        whole = (self.words(count) >> np.uint64(11)) + np.uint64(1)
        return whole.astype(np.float64) * 2.0**-53

    def lots(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Which of ``count`` units a Poisson sample of ``rate`` holds, ascending."""
        return np.flatnonzero(self.uniform(count) <= rate)

    def seed(self) -> int:
        """For a generator of what need not be secret for ever, such as augmentation: 0 to 2^63 - 1."""
        return int(self.words(1)[0] >> np.uint64(1))

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """``count`` standard normal numbers, each the scaled sum of DRAWS draws."""
        return np.concatenate(
            [self._normal(min(CHUNK, count - start)) for start in range(0, count, CHUNK)] or [np.zeros(0)]
        )

    def _normal(self, count: int) -> npt.NDArray[np.float64]:
        half = -(-count // 2)
        total = torch.zeros(2 * half, dtype=torch.float64)
        for _ in range(DRAWS):  # by torch, whose vectorised cosine is some eight times as fast as numpy's
            radius = torch.from_numpy(self.uniform(half)).log_().mul_(-2.0).sqrt_()
            angle = torch.from_numpy(self.uniform(half)).mul_(2 * math.pi)
            total[:half] += radius * angle.cos()
            total[half:] += radius.mul_(angle.sin_())
        return (total[:count] / math.sqrt(DRAWS)).numpy()


def add_normal(values: Tensor, std: float, source: SecureRandom) -> Tensor:
    """``values`` plus noise of standard deviation ``std``, added in double precision and rounded once."""
    noise = torch.from_numpy(std * source.normal(values.numel())).view(values.shape)
    return (values.double() + noise.to(values.device)).to(values.dtype)
