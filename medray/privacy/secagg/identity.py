"""Who signed: a site's node key speaks for it, as the federation's authority has certified.

With this the server, which passes the sites' keys on, can't put keys of its own in their place.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medray.errors import FederationError
from medray.privacy.credentials import check_dates, node_of

__all__ = ["Signer", "check_signature"]

_HOW = ec.ECDSA(hashes.SHA384())


def check_signature(authority: bytes, site: str, certificate: bytes, signature: bytes, text: bytes) -> None:
    """Make sure that it was ``site`` who signed a text.

    Args:
        authority: its certificate, PEM.
        site: by name.
        certificate: of the site's node key, PEM.
        signature, text: by that key, of that text.

    Raises:
        FederationError: the certificate is another site's, or none of this federation, or has run out; the signature is
            false.
    """
    found, public = node_of(certificate, authority, now=_now())
    if found != site:
        raise FederationError(f"what is said to be of site {site!r} is signed by {found!r}")
    key = serialization.load_pem_public_key(public)
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(signature, text, _HOW)
    except InvalidSignature:
        raise FederationError(
            f"the signature of site {site!r} is false: its words were altered, or it was asked something else"
        ) from None


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class Signer:
    """A site's key and certificate, and the authority that certifies the others.

    Args:
        name: of the site.
        certificate, key: of its start-up kit: PEM, OpenSSH's format.
        authority: its certificate, PEM.

    Raises:
        FederationError: they don't belong together, or the certificate has run out.
    """

    def __init__(self, name: str, *, certificate: bytes, key: bytes, authority: bytes) -> None:
        self.certificate, self._authority = certificate, authority
        try:
            private = serialization.load_ssh_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise FederationError(
                f"node.key: no OpenSSH private key ({error}). Take it from the start-up kit"
            ) from None
        site, public = node_of(certificate, authority, now=_now())
        own = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        if site != name or public != own or not isinstance(private, ec.EllipticCurvePrivateKey):
            raise FederationError(
                f"node.crt is of site {site!r}, and its key isn't the one in node.key of {name!r}. Take both from one "
                "start-up kit"
            )
        self._private = private

    @classmethod
    def read(cls, name: str, *, certificate: Path, key: Path, authority: Path) -> Signer:
        """From files.

        Raises:
            FederationError: one is missing, or they don't belong together.
        """
        try:
            parts = {"certificate": certificate, "key": key, "authority": authority}
            return cls(name, **{part: path.read_bytes() for part, path in parts.items()})
        except OSError as error:
            raise FederationError(
                f"{error.filename}: {error.strerror}. Secure aggregation signs with what lies in the start-up kit"
            ) from None

    def sign(self, text: bytes) -> bytes:
        """The signature of a text.

        Raises:
            FederationError: the certificate has run out since.
        """
        check_dates(x509.load_pem_x509_certificate(self.certificate), "node.crt", now=_now())
        return self._private.sign(text, _HOW)

    def check(self, site: str, certificate: bytes, signature: bytes, text: bytes) -> None:
        """Make sure that it was ``site`` who signed.

        Raises:
            FederationError: the certificate is another site's, or none of this federation; the signature is false.
        """
        check_signature(self._authority, site, certificate, signature, text)
