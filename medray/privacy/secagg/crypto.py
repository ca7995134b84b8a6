"""Keys, streams and envelopes of secure aggregation, all of the ``cryptography`` package.

Agreement: X25519 (RFC 7748), its result through HKDF-SHA256 (RFC 5869) with what it is for. Masks: ChaCha20 (RFC 8439),
whose key has all 256 bits, used once. Envelopes: ChaCha20-Poly1305.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medray.errors import FederationError

__all__ = ["KEY_BYTES", "agree", "new_secret", "open_envelope", "public_of", "seal", "stream"]

KEY_BYTES = 32
_NONCE_BYTES = 12
CHUNK = 1 << 22
"""Bytes of a stream made at once."""


def new_secret() -> bytes:
    """32 bytes from the operating system: a private key, or the key of a stream."""
    return os.urandom(KEY_BYTES)


def public_of(private: bytes) -> bytes:
    """The public key, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, *, purpose: bytes) -> bytes:
    """The key that two sides share, each from its private and the other's public key; 32 bytes.

    Args:
        private: 32 bytes.
        public: the other side's, 32 bytes.
        purpose: what it is for, and between whom, alike on both sides; another one gives another key. Public keys that
            are twins of each other give the same secret, so the purpose has to tell the two sides from others.

    Raises:
        FederationError: the public key is none (of low order): anybody would know the result.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise FederationError("a public key of secure aggregation is none") from None
    if not any(shared):  # the library refuses it already; nothing else here would notice, if it stopped to
        raise FederationError("a public key of secure aggregation is none")
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(shared)


def stream(key: bytes, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """``count`` unsigned words that look random to whoever doesn't know the key, and are the same for who does."""
    update = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update
    found = np.empty(count * dtype.itemsize, np.uint8)
    for start in range(0, found.size, CHUNK):
        part = found[start : start + CHUNK]
        part[:] = np.frombuffer(update(bytes(part.size)), np.uint8)
    return found.view(dtype)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """An envelope that only ``key`` opens; ``about`` has to be named again then."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about)


def open_envelope(key: bytes, envelope: bytes, about: bytes) -> bytes | None:
    """What :func:`seal` put in; None where it was altered, or is for somebody else."""
    try:
        return ChaCha20Poly1305(key).decrypt(envelope[:_NONCE_BYTES], envelope[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError):
        return None
