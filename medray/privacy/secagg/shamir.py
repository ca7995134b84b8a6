"""Secrets in shares: any ``threshold`` of them give the secret, fewer say nothing at all (Shamir 1979, CACM 22:11).

A secret of 32 bytes is the constant term of a polynomial of degree threshold - 1 over the integers modulo a prime above
2^256, whose other coefficients come from the system's cryptographic generator; a share is its value at a point.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from medray.errors import FederationError

__all__ = ["PRIME", "combine", "split"]

PRIME = 2**256 + 297
"""The smallest prime above 2^256: any 32 bytes are a number below it."""
SECRET_BYTES = 32


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, int]:
    """Shares of a secret, by point.

    Args:
        secret: 32 bytes.
        points: where the polynomial is read; distinct, from 1.
        threshold: shares that are needed.
    """
    if len(secret) != SECRET_BYTES or len(set(points)) != len(points) or min(points, default=0) < 1:
        raise ValueError("a secret has 32 bytes, and points are distinct and above 0")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"a threshold of {threshold} can't be met by {len(points)} shares")
    terms = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for point in points:
        value = 0
        for term in reversed(terms):
            value = (value * point + term) % PRIME
        shares[point] = value
    return shares


def combine(shares: Mapping[int, int]) -> bytes:
    """The secret that shares are of: as many as the threshold asks for, or more, all from one :func:`split`.

    Raises:
        FederationError: they can't be of one secret.
    """
    weights = _at_zero(tuple(sorted(shares)))
    value = sum(weights[point] * share for point, share in shares.items()) % PRIME
    try:
        return value.to_bytes(SECRET_BYTES, "big")
    except OverflowError:
        raise FederationError("shares of a secret don't fit together: one of them is false") from None


@lru_cache(maxsize=8)
def _at_zero(points: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights, with which the values at ``points`` give that at 0."""
    found = {}
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        found[point] = above * pow(below, -1, PRIME) % PRIME
    return found
