"""Shares: any threshold of them give the secret, and fewer fit every secret alike."""

from __future__ import annotations

import itertools
import os
import random

import pytest

from medray.errors import FederationError
from medray.privacy.secagg.shamir import PRIME, combine, split


def test_the_modulus_is_the_first_prime_above_all_secrets() -> None:
    """Miller and Rabin's test, with bases by lot: a composite passes with probability below 2^-80."""
    rng = random.Random(0)

    def prime(n: int) -> bool:
        d, r = n - 1, 0
        while d % 2 == 0:
            d, r = d // 2, r + 1
        for _ in range(40):
            x = pow(rng.randrange(2, n - 1), d, n)
            if x in (1, n - 1):
                continue
            if not any((x := x * x % n) == n - 1 for _ in range(r - 1)):
                return False
        return True

    assert prime(PRIME) and PRIME > 2**256
    assert not any(prime(n) for n in range(2**256 + 1, PRIME, 2))


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, os.urandom(32)], ids=["zero", "most", "random"])
def test_every_threshold_of_shares_gives_the_secret_and_no_fewer(secret: bytes) -> None:
    for count in range(1, 6):
        for threshold in range(1, count + 1):
            shares = split(secret, range(1, count + 1), threshold)
            for size in range(threshold, count + 1):
                for chosen in itertools.combinations(shares, size):
                    assert combine({point: shares[point] for point in chosen}) == secret
            if threshold > 1:
                few = {point: shares[point] for point in list(shares)[: threshold - 1]}
                with pytest.raises(FederationError):  # but for one in 2^248, it isn't even a number of 32 bytes
                    assert combine(few) != secret
                    raise FederationError("another secret")


def test_fewer_shares_fit_every_secret_alike() -> None:
    """For any other secret there is a polynomial through the same shares: they say nothing of which it was."""
    shares = split(os.urandom(32), (1, 2, 3), 3)
    known = {1: shares[1], 2: shares[2]}
    for other in (0, 1, 2**256 - 1):
        # Degree 2 through (0, other), (1, s1), (2, s2), read at 3: with that third share the secret would be `other`.
        third = (other - 3 * known[1] + 3 * known[2]) % PRIME
        assert int.from_bytes(combine({**known, 3: third}), "big") == other


def test_the_same_secret_is_never_split_alike() -> None:
    secret = os.urandom(32)
    first, again = split(secret, (1, 2, 3), 2), split(secret, (1, 2, 3), 2)
    assert all(first[point] != again[point] for point in first)


def test_what_is_no_split_is_refused() -> None:
    for secret, points, threshold in [(b"short", (1, 2), 2), (bytes(32), (1, 1), 1), (bytes(32), (0, 1), 1)]:
        with pytest.raises(ValueError, match="32 bytes"):
            split(secret, points, threshold)
    with pytest.raises(ValueError, match="threshold of 3"):
        split(bytes(32), (1, 2), 3)
